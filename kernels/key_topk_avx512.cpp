// The largest key coefficients of each row, bfloat16 on CPUs with AVX-512. Compiled and called by
// key_topk_avx512.py.
//
// A coefficient and its index make one 32-bit key: the 16 bits of the value in an order-preserving
// form above the 16 bits of 65535 - index. So keys never tie, and the larger of two equal
// coefficients is that of lower index. Each lane keeps its own K largest; the row's are among them.
//
// Letters: M rows, a thread is given BLOCK at a time; F coefficients of a row, at most 65536, K of
// them kept.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>

#include "lanes.hpp"
#include "threads.hpp"

namespace {

constexpr int64_t BLOCK = 64;

// Bits of bfloat16 to unsigned integers in the order of the values; -0 becomes 0.
__m512i ordered(__m512i bits) {
    const __mmask16 zero = _mm512_cmpeq_epi32_mask(bits, _mm512_set1_epi32(0x8000));
    bits = _mm512_mask_mov_epi32(bits, zero, _mm512_setzero_si512());
    const __mmask16 negative = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x8000));
    const __m512i flip = _mm512_mask_mov_epi32(
        _mm512_set1_epi32(0x8000), negative, _mm512_set1_epi32(0xFFFF));
    return _mm512_xor_si512(bits, flip);
}

void best_of_row(const uint16_t* row, int64_t width, int64_t kept, uint32_t* largest,
                 int32_t* best) {
    std::fill_n(largest, kept * LANES, 0);
    __m512i places = _mm512_setr_epi32(
        0xFFFF, 0xFFFE, 0xFFFD, 0xFFFC, 0xFFFB, 0xFFFA, 0xFFF9, 0xFFF8,
        0xFFF7, 0xFFF6, 0xFFF5, 0xFFF4, 0xFFF3, 0xFFF2, 0xFFF1, 0xFFF0);
    __mmask16 nan = 0;
    for (int64_t f = 0; f < width; f += LANES) {
        const __mmask16 inside = lanes_below(width, f);
        const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, row + f));
        nan |= _mm512_cmpgt_epi32_mask(
            _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFF)), _mm512_set1_epi32(0x7F80));
        __m512i key =
            _mm512_maskz_or_epi32(inside, _mm512_slli_epi32(ordered(bits), 16), places);
        for (int64_t k = 0; k < kept; ++k) {
            uint32_t* lanes = largest + k * LANES;
            const __m512i before = _mm512_loadu_si512(lanes);
            _mm512_storeu_si512(lanes, _mm512_max_epu32(before, key));
            key = _mm512_min_epu32(before, key);
        }
        places = _mm512_sub_epi32(places, _mm512_set1_epi32(LANES));
    }
    std::partial_sort(
        largest, largest + kept, largest + kept * LANES, std::greater<uint32_t>());
    for (int64_t k = 0; k < kept; ++k)
        best[k] = static_cast<int32_t>(nan ? width : 0xFFFF - (largest[k] & 0xFFFF));
}

}  // namespace

extern "C" {

// x: bfloat16 [M, F]. best: int32 [M, K], in descending order; F in all places of a row with NaN.
void key_topk(const uint16_t* x, int64_t rows, int64_t width, int64_t kept, int64_t threads,
              int32_t* best) {
    on_threads(threads, [=](auto next) {
        // The k-th largest of each lane, [K][LANES].
        const auto largest = std::make_unique<uint32_t[]>(kept * LANES);
        for (int64_t first; (first = next() * BLOCK) < rows;)
            for (int64_t m = first; m < std::min(first + BLOCK, rows); ++m)
                best_of_row(x + m * width, width, kept, largest.get(), best + m * kept);
    });
}

}  // extern "C"
