// Peaks, means, histograms of codes and codes of neurons, bfloat16 on CPUs with AVX-512. Compiled and
// called by neuron_sums_avx512.py; activation_codes.py says what a code is.
//
// Images are shared among the threads for peaks and means, neurons for the histograms: so no two
// threads write the same place, and a group's histograms stay in the second-level cache.
//
// Letters: N images, T tokens, P of them before the patches, G patches, F neurons, S tokens counted of
// an image, Q pairs of an image and a neuron.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "lanes.hpp"
#include "threads.hpp"

namespace {

constexpr int AT_ONCE = 4;  // rows of a pass, so that peaks and sums move less often
constexpr int64_t CODES = 256;
constexpr int64_t GROUP = 256;  // neurons whose histograms a thread fills, 256 kB
constexpr int64_t ROWS_AHEAD = 16;  // that are fetched while others are coded
constexpr int SUB_BITS = 19, BASE = 1984, LARGEST = 127;  // as in activation_codes.py

// The codes of 16 values, one a lane.
__m512i codes_of(__m512 value) {
    const __mmask16 negative =
        _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_LT_OQ);
    const __m512 shifted = _mm512_add_ps(_mm512_abs_ps(value), _mm512_set1_ps(0.125f));
    __m512i m = _mm512_srli_epi32(_mm512_castps_si512(shifted), SUB_BITS);
    m = _mm512_sub_epi32(m, _mm512_set1_epi32(BASE));
    m = _mm512_min_epu32(m, _mm512_set1_epi32(LARGEST));  // of NaN too
    const __m512i above = _mm512_add_epi32(m, _mm512_set1_epi32(LARGEST + 1));
    return _mm512_mask_sub_epi32(above, negative, _mm512_set1_epi32(LARGEST), m);
}

// Adds ROWS rows to what peak and sum hold.
template <int ROWS>
void take(const uint16_t* rows, int64_t width, float* peak, float* sum) {
    for (int64_t f = 0; f < width; f += LANES) {
        const __mmask16 inside = lanes_below(width, f);
        __m512 largest = _mm512_maskz_loadu_ps(inside, peak + f);
        __m512 total = _mm512_maskz_loadu_ps(inside, sum + f);
        for (int r = 0; r < ROWS; ++r) {
            const __m512 value = widen(_mm256_maskz_loadu_epi16(inside, rows + r * width + f));
            largest = _mm512_max_ps(value, largest);
            total = _mm512_add_ps(total, value);
        }
        _mm512_mask_storeu_ps(peak + f, inside, largest);
        _mm512_mask_storeu_ps(sum + f, inside, total);
    }
}

void peak_and_mean_of(const uint16_t* patches, int64_t count, int64_t width, float* peak,
                      float* mean) {
    std::fill_n(peak, width, -std::numeric_limits<float>::infinity());
    std::fill_n(mean, width, 0.0f);
    int64_t g = 0;
    for (; g + AT_ONCE <= count; g += AT_ONCE) take<AT_ONCE>(patches + g * width, width, peak, mean);
    for (; g < count; ++g) take<1>(patches + g * width, width, peak, mean);
    for (int64_t f = 0; f < width; ++f) mean[f] /= static_cast<float>(count);
}

}  // namespace

extern "C" {

// x: bfloat16 [N, T, F]. counted: [N, S], in [0, T). peak, mean: [N, F], over the tokens from P on.
// histogram: [F, CODES], zeros before.
void neuron_sums(const uint16_t* x, int64_t images, int64_t tokens, int64_t prefix, int64_t width,
                 const int32_t* counted, int64_t samples, int64_t threads, float* peak,
                 float* mean, int32_t* histogram) {
    on_threads(threads, [=](auto next) {
        for (int64_t n; (n = next()) < images;)
            peak_and_mean_of(x + (n * tokens + prefix) * width, tokens - prefix, width,
                             peak + n * width, mean + n * width);
    });
    on_threads(threads, [=](auto next) {
        alignas(64) int32_t codes[LANES];
        for (int64_t first; (first = next() * GROUP) < width;) {
            const int64_t last = std::min(first + GROUP, width);
            for (int64_t n = 0; n < images; ++n)
                for (int64_t s = 0; s < samples; ++s) {
                    const uint16_t* row = x + (n * tokens + counted[n * samples + s]) * width;
                    for (int64_t f = first; f < last; f += LANES) {
                        const __mmask16 inside = lanes_below(last, f);
                        const __m256i bits = _mm256_maskz_loadu_epi16(inside, row + f);
                        _mm512_store_si512(codes, codes_of(widen(bits)));
                        const int64_t lanes = std::min<int64_t>(LANES, last - f);
                        for (int64_t i = 0; i < lanes; ++i)
                            ++histogram[(f + i) * CODES + codes[i]];
                    }
                }
        }
    });
}

// Codes of all patches of pairs. x: as above. image, neuron: [Q]; neighbours that lie close in x are
// quick. codes: [Q, G].
void pair_codes(const uint16_t* x, int64_t tokens, int64_t prefix, int64_t width,
                const int64_t* image, const int64_t* neuron, int64_t pairs, int64_t threads,
                uint8_t* codes) {
    const int64_t patches = tokens - prefix;
    on_threads(threads, [=](auto next) {
        alignas(32) uint16_t bits[LANES] = {};
        alignas(16) uint8_t found[LANES];
        for (int64_t first; (first = next() * LANES) < pairs;) {
            const int64_t count = std::min<int64_t>(LANES, pairs - first);
            const uint16_t* column[LANES];
            for (int64_t i = 0; i < count; ++i)
                column[i] = x + (image[first + i] * tokens + prefix) * width + neuron[first + i];
            for (int64_t g = 0; g < patches; ++g) {
                // Rows are too far apart for the processor to foresee. Past the end it does no harm.
                _mm_prefetch(column[0] + (g + ROWS_AHEAD) * width, _MM_HINT_T0);
                _mm_prefetch(column[count - 1] + (g + ROWS_AHEAD) * width, _MM_HINT_T0);
                for (int64_t i = 0; i < count; ++i) bits[i] = column[i][g * width];
                const __m256i values = _mm256_load_si256(reinterpret_cast<const __m256i*>(bits));
                _mm_store_si128(reinterpret_cast<__m128i*>(found),
                                _mm512_cvtepi32_epi8(codes_of(widen(values))));
                for (int64_t i = 0; i < count; ++i) codes[(first + i) * patches + g] = found[i];
            }
        }
    });
}

}  // extern "C"
