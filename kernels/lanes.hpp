// Vectors of 16 lanes, for the C++ kernels beside it.

#pragma once

#include <immintrin.h>

#include <cstdint>

constexpr int LANES = 16;

// The lanes, from place `first` on, that lie below `bound`.
inline __mmask16 lanes_below(int64_t bound, int64_t first) {
    if (bound >= first + LANES) return 0xFFFF;
    return bound <= first ? 0 : static_cast<__mmask16>((1u << (bound - first)) - 1);
}

// Bits of bfloat16 to float32, exactly.
inline __m512 widen(__m256i bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}
