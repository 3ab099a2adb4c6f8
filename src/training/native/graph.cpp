// Work that a CUDA device records once and launches again as a whole, by way of libtorch's at::cuda::CUDAGraph.
//
// Its header needs CUDA's own, and its library is loaded only where a device is asked for (see device.rs): a build needs
// neither. So its functions are looked up in what is loaded, by the names that the C++ ABI gives them. Only they touch an
// object, which has 104 bytes in libtorch 2.11.

#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <cstddef>
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

}  // namespace

extern "C" {

struct SapoGraph {
    explicit SapoGraph(c10::Device device)
        : device(device), guard(c10::impl::getDeviceGuardImpl(device.type())), before(guard->getStream(device)) {
        functions().construct(object, false);
    }
    ~SapoGraph() { functions().destroy(object); }
    SapoGraph(const SapoGraph&) = delete;
    SapoGraph& operator=(const SapoGraph&) = delete;

    c10::Device device;
    const c10::impl::DeviceGuardImplInterface* guard;
    // The stream that was this thread's before it recorded.
    c10::Stream before;
    alignas(std::max_align_t) std::byte object[1024];
};

// From here on until sapo_graph_end, what this thread launches on the device is recorded, and not done.
char* sapo_graph_begin(int64_t device_index, SapoGraph** graph) {
    return guarded([&] {
        const c10::Device device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device_index));
        const OnDevice on(device);
        auto* recording = new SapoGraph(device);
        try {
            // The default stream cannot be recorded. As torch.cuda.graph does, what is under way is waited for.
            recording->guard->synchronizeStream(recording->before);
            recording->guard->exchangeStream(recording->guard->getStreamFromGlobalPool(device));
            functions().begin(recording->object, PoolId(0, 0), kThreadLocal);
        } catch (...) {
            recording->guard->exchangeStream(recording->before);
            delete recording;
            throw;
        }
        *graph = recording;
    });
}

// Ends the recording, whatever came of it. Tensors that were made during it stay where they are.
char* sapo_graph_end(SapoGraph* graph) {
    return guarded([&] {
        const OnDevice on(graph->device);
        try {
            functions().end(graph->object);
        } catch (...) {
            graph->guard->exchangeStream(graph->before);
            throw;
        }
        graph->guard->exchangeStream(graph->before);
    });
}

// Does what was recorded, on the thread's stream.
char* sapo_graph_replay(SapoGraph* graph) {
    return guarded([&] {
        const OnDevice on(graph->device);
        functions().replay(graph->object);
    });
}

// Its memory is free when the tensors that were made are gone, too.
char* sapo_graph_free(SapoGraph* graph) {
    return guarded([&] { delete graph; });
}
}
