// Streams of a CUDA device for threads, by way of what c10 has for any device: no header of CUDA's is needed.

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "guarded.h"

namespace {

c10::Device cuda(int64_t index) { return {c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(index)}; }

}  // namespace

extern "C" {

// Makes a device the calling thread's current one.
char* sapo_device_enter(int64_t index) {
    return guarded([&] { c10::impl::getDeviceGuardImpl(c10::DeviceType::CUDA)->setDevice(cuda(index)); });
}

// Gives the calling thread a stream other than the default one on a device. libtorch has 32 of low and 32 of high priority for
// each device, and hands them out in turn: the 33rd thread shares the first one's, which is slower and no harm.
char* sapo_stream_take(int64_t index) {
    return guarded([&] {
        const auto* guard = c10::impl::getDeviceGuardImpl(c10::DeviceType::CUDA);
        guard->exchangeStream(guard->getStreamFromGlobalPool(cuda(index), false));
    });
}

// Waits until a device has done all that the calling thread's stream there holds: its own, or the default one.
char* sapo_stream_finish(int64_t index) {
    return guarded([&] {
        const auto* guard = c10::impl::getDeviceGuardImpl(c10::DeviceType::CUDA);
        guard->synchronizeStream(guard->getStream(cuda(index)));
    });
}
}
