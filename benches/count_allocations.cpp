// Counts what a run of sapo-flow allocates, and can take its allocators away: see allocators.py, which compiles it and has it
// loaded before all other libraries.
//
// COUNTS=FILE           where the counts go at exit
// WITHOUT_MALLOPT=1     glibc's allocator stays as it comes
// WITHOUT_HEAP=1        large tensors get no heap of their own

#include <atomic>
#include <cstdio>
#include <cstdlib>

#include <dlfcn.h>
#include <sys/resource.h>

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

namespace {

struct Count {
    std::atomic<unsigned long> calls{0}, bytes{0};

    void add(size_t size) {
        calls.fetch_add(1, std::memory_order_relaxed);
        bytes.fetch_add(size, std::memory_order_relaxed);
    }
};

Count mallocs, heap_asked, elsewhere;

// The function that would have been called, in the next library that has it.
template <typename Function>
Function* next(const char* name) {
    return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

// Counts what a heap is asked for, in front of it.
struct Counting final : c10::Allocator {
    explicit Counting(c10::Allocator* heap) : heap(heap) {}

    c10::DataPtr allocate(size_t bytes) override {
        heap_asked.add(bytes);
        return heap->allocate(bytes);
    }

    c10::DeleterFnPtr raw_deleter() const override { return heap->raw_deleter(); }

    void copy_data(void* to, const void* from, size_t bytes) const override { heap->copy_data(to, from, bytes); }

    c10::Allocator* heap;
};

__attribute__((destructor)) void write_counts() {
    const char* name = std::getenv("COUNTS");
    std::FILE* file = name ? std::fopen(name, "w") : nullptr;
    if (!file) return;
    // What the heap was asked for and had libtorch place is among the C allocator's.
    const bool heap = heap_asked.calls > 0;
    rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    std::fprintf(file, "{\"mallocs\": %lu, \"malloc_bytes\": %lu, ", mallocs.calls.load(), mallocs.bytes.load());
    std::fprintf(file, "\"tensors\": %lu, \"tensor_bytes\": %lu, ", heap ? heap_asked.calls - elsewhere.calls : 0,
                 heap ? heap_asked.bytes - elsewhere.bytes : 0);
    std::fprintf(file, "\"faults\": %ld, \"system\": %ld.%06ld}\n", usage.ru_minflt, usage.ru_stime.tv_sec,
                 usage.ru_stime.tv_usec);
    std::fclose(file);
}

}  // namespace

extern "C" {

void* malloc(size_t size) {
    static auto* const call = next<void*(size_t)>("malloc");
    mallocs.add(size);
    return call(size);
}

void* calloc(size_t count, size_t size) {
    static auto* const call = next<void*(size_t, size_t)>("calloc");
    mallocs.add(count * size);
    return call(count, size);
}

void* realloc(void* place, size_t size) {
    static auto* const call = next<void*(void*, size_t)>("realloc");
    mallocs.add(size);
    return call(place, size);
}

int posix_memalign(void** place, size_t alignment, size_t size) {
    static auto* const call = next<int(void**, size_t, size_t)>("posix_memalign");
    mallocs.add(size);
    return call(place, alignment, size);
}

void* aligned_alloc(size_t alignment, size_t size) {
    static auto* const call = next<void*(size_t, size_t)>("aligned_alloc");
    mallocs.add(size);
    return call(alignment, size);
}

int mallopt(int param, int value) {
    static auto* const call = next<int(int, int)>("mallopt");
    return std::getenv("WITHOUT_MALLOPT") ? 1 : call(param, value);
}

}  // extern "C"

namespace c10 {

// What native/heap.cpp calls to place its heap.
void SetCPUAllocator(Allocator* heap, uint8_t priority) {
    static auto* const call = next<void(Allocator*, uint8_t)>("_ZN3c1015SetCPUAllocatorEPNS_9AllocatorEh");
    if (!std::getenv("WITHOUT_HEAP")) call(new Counting(heap), priority);
}

// libtorch's own place for a tensor.
void* alloc_cpu(size_t bytes) {
    static auto* const call = next<void*(size_t)>("_ZN3c109alloc_cpuEm");
    elsewhere.add(bytes);
    return call(bytes);
}

}  // namespace c10
