// Work that a CUDA device records once and launches again as a whole, by way of libtorch's at::cuda::CUDAGraph.
//
// Its header needs CUDA's own, and its library is loaded only where a device is asked for (see device.rs): a build needs
// neither. So its functions are looked up in what is loaded, by the names that the C++ ABI gives them. Only they touch an
// object, which has 104 bytes in libtorch 2.11.

#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "guarded.h"

namespace {

using PoolId = std::pair<unsigned long long, unsigned long long>;

template <typename F>
F* function(const char* name) {
    void* found = dlsym(RTLD_DEFAULT, name);
    TORCH_CHECK(found, "this libtorch has no function ", name, ", which CUDA graphs need");
    return reinterpret_cast<F*>(found);
}

struct Functions {
    void (*construct)(void*, bool keep_graph) = function<void(void*, bool)>("_ZN2at4cuda9CUDAGraphC1Eb");
    void (*destroy)(void*) = function<void(void*)>("_ZN2at4cuda9CUDAGraphD1Ev");
    void (*begin)(void*, PoolId, int mode) =
        function<void(void*, PoolId, int)>("_ZN2at4cuda9CUDAGraph13capture_beginESt4pairIyyE21cudaStreamCaptureMode");
    PoolId (*pool)(void*) = function<PoolId(void*)>("_ZN2at4cuda9CUDAGraph4poolEv");
    void (*end)(void*) = function<void(void*)>("_ZN2at4cuda9CUDAGraph11capture_endEv");
    void (*replay)(void*) = function<void(void*)>("_ZN2at4cuda9CUDAGraph6replayEv");
};

const Functions& functions() {
    static const Functions found;
    return found;
}

// cudaStreamCaptureModeThreadLocal: other threads go on, and may allocate.
constexpr int kThreadLocal = 1;

// Makes a device the current one for a while.
class OnDevice {
  public:
    explicit OnDevice(c10::Device device)
        : guard_(c10::impl::getDeviceGuardImpl(device.type())), before_(guard_->exchangeDevice(device)) {}
    ~OnDevice() { guard_->uncheckedSetDevice(before_); }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    const c10::impl::DeviceGuardImplInterface* guard_;
    c10::Device before_;
};

// Graphs are made, begun, ended and freed one at a time: each registers with the device's generator of random numbers, which
// all threads share and nothing guards.
std::mutex one_at_a_time;

class CudaGraph {
  public:
    CudaGraph() {
        const std::lock_guard<std::mutex> lock(one_at_a_time);
        functions().construct(object_, false);
    }
    ~CudaGraph() {
        const std::lock_guard<std::mutex> lock(one_at_a_time);
        functions().destroy(object_);
    }
    CudaGraph(const CudaGraph&) = delete;
    CudaGraph& operator=(const CudaGraph&) = delete;

    // With memory from the pool of another graph, or from a new one.
    void begin(CudaGraph* other) {
        const std::lock_guard<std::mutex> lock(one_at_a_time);
        functions().begin(object_, other ? functions().pool(other->object_) : PoolId(0, 0), kThreadLocal);
    }
    void end() {
        const std::lock_guard<std::mutex> lock(one_at_a_time);
        functions().end(object_);
    }
    void replay() { functions().replay(object_); }

  private:
    alignas(std::max_align_t) std::byte object_[1024];
};

// What a thread records on a device goes through one stream and into one pool of memory, where libtorch finds the blocks that
// earlier graphs have left, by their stream. Pools of their own would stay behind: they are given back when memory has run out,
// but not while something is recorded.
struct Recorder {
    c10::Stream stream;
    // A pool can be used again only while one of its graphs is there: the last one stays until the next has been recorded.
    std::shared_ptr<CudaGraph> last;
};

thread_local std::map<c10::DeviceIndex, Recorder> recorders;

Recorder& recorder(c10::Device device, const c10::impl::DeviceGuardImplInterface& guard) {
    const auto found = recorders.find(device.index());
    if (found != recorders.end()) return found->second;
    // Of high priority, as no thread's own is (stream.cpp): what was sent there meanwhile would be recorded, too.
    const auto stream = guard.getStreamFromGlobalPool(device, true);
    return recorders.emplace(device.index(), Recorder{stream, nullptr}).first->second;
}

}  // namespace

extern "C" {

struct SapoGraph {
    c10::Device device;
    const c10::impl::DeviceGuardImplInterface* guard;
    // The stream that was this thread's before it recorded.
    c10::Stream before;
    std::shared_ptr<CudaGraph> recorded;
};

// From here on until sapo_graph_end, what this thread launches on the device is recorded, and not done.
char* sapo_graph_begin(int64_t device_index, SapoGraph** graph) {
    return guarded([&] {
        const c10::Device device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device_index));
        const OnDevice on(device);
        const auto* guard = c10::impl::getDeviceGuardImpl(device.type());
        const auto before = guard->getStream(device);
        auto recording = std::make_unique<SapoGraph>(SapoGraph{device, guard, before, std::make_shared<CudaGraph>()});
        // The default stream cannot be recorded. As torch.cuda.graph does, what is under way is waited for.
        guard->synchronizeStream(before);
        const auto& with = recorder(device, *guard);
        guard->exchangeStream(with.stream);
        try {
            recording->recorded->begin(with.last.get());
        } catch (...) {
            guard->exchangeStream(before);
            // After an error nothing is known of the stream and the pool.
            recorders.erase(device.index());
            throw;
        }
        *graph = recording.release();
    });
}

// Ends the recording, whatever came of it. Tensors that were made during it stay where they are.
char* sapo_graph_end(SapoGraph* graph) {
    return guarded([&] {
        const OnDevice on(graph->device);
        try {
            graph->recorded->end();
        } catch (...) {
            graph->guard->exchangeStream(graph->before);
            recorders.erase(graph->device.index());
            throw;
        }
        graph->guard->exchangeStream(graph->before);
        recorder(graph->device, *graph->guard).last = graph->recorded;
    });
}

// Does what was recorded, on the thread's stream.
char* sapo_graph_replay(SapoGraph* graph) {
    return guarded([&] {
        const OnDevice on(graph->device);
        graph->recorded->replay();
    });
}

// Its memory is free for the next recording when the tensors that were made are gone, too.
char* sapo_graph_free(SapoGraph* graph) {
    return guarded([&] { delete graph; });
}
}
