// Numbers as the arithmetic reads and writes them. Without linkage: every compilation has its own, for its own instructions.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels.h"

namespace {

inline float read(float value) { return value; }

inline float read(int8_t value) { return static_cast<float>(value); }

inline float read(Bf16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline void write(float* to, float value) { *to = value; }

inline void write(Bf16* to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to->bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

// e^x to 2 units in the last place, as Cephes' expf computes it, in a form that vectorises; 0 below e^-87, infinite above
// e^88.
inline float exponential(float x) {
    const float low = x < -87.0f ? -87.0f : x;  // comparisons let NaN through
    const float bounded = low > 88.0f ? 88.0f : low;
    const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which stands in the low bits
    const float shifted = bounded * 1.44269504088896341f + shifter;
    const float whole = shifted - shifter;
    const float rest = (bounded - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    int32_t power;
    std::memcpy(&power, &shifted, sizeof power);
    const int32_t scale_bits = (power << 23) + (127 << 23);
    float scale;
    std::memcpy(&scale, &scale_bits, sizeof scale);
    const float value = x < -87.0f ? 0.0f : sum * scale;
    return x > 88.0f ? std::numeric_limits<float>::infinity() : value;
}

}  // namespace
