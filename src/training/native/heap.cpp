// Places for the tensors on a CPU, from a heap of Rust's: see heap.rs.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

namespace {

using Take = void* (*)(size_t bytes);      // null: libtorch's own place will do
using GiveBack = bool (*)(void* place);    // false: not one of the heap's

Take take = nullptr;
GiveBack give_back = nullptr;

void release(void* place) {
    if (!give_back(place)) c10::free_cpu(place);
}

struct Heap final : c10::Allocator {
    c10::DataPtr allocate(size_t bytes) override {
        void* place = take(bytes);
        if (!place) place = c10::alloc_cpu(bytes);
        return {place, place, &release, c10::Device(c10::DeviceType::CPU)};
    }

    c10::DeleterFnPtr raw_deleter() const override { return &release; }

    void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

// From here on tensors on a CPU get their memory from `from`, and give it back to `to`; both are called on any thread. To be
// called once. Memory that tensors have already is libtorch's as before.
extern "C" void sapo_place_tensors(Take from, GiveBack to) {
    take = from;
    give_back = to;
    c10::SetCPUAllocator(new Heap);
}
