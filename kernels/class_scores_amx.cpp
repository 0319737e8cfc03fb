// Class scoring in bfloat16 on CPUs with AMX: LayerNorm statistics, projection, rank, label logit,
// logsumexp and top classes in one pass. Compiled and called by class_scores_amx.py.
//
// A block of BLOCK rows is multiplied with the whole class space in tile registers, in float32
// accumulators. Its logits stay in the second-level cache until the same thread has reduced them;
// the label's logit is one of them, so no other sum can disagree with it. Logits of all rows never
// exist.
//
// Letters: M rows, D width, Dp the same up to a multiple of 32, C classes, Cp up to a multiple
// of 32, K top classes.

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "amx.hpp"
#include "lanes.hpp"
#include "threads.hpp"

namespace {

constexpr int BLOCK = 64;  // rows whose logits are held by a thread

// Rows into tiles, [Dp / 32][16][32] for each 16 of them, and rstd of each; NaN where the variance
// is not finite. Rows behind the last are zeros.
void pack_rows(const uint16_t* x, int rows, int64_t width, int64_t depth, float eps,
               uint16_t* tiles, float* rstd) {
    const int64_t steps = depth / TILE_DEPTH;
    std::memset(tiles, 0, sizeof(uint16_t) * BLOCK * depth);
    for (int m = 0; m < rows; ++m) {
        const uint16_t* row = x + m * width;
        uint16_t* tile = tiles + (m / TILE_ROWS) * steps * TILE_VALUES + m % TILE_ROWS * TILE_DEPTH;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t d = 0; d < width; d += LANES) {
            const __mmask16 inside = lanes_below(width, d);
            const __m256i part = _mm256_maskz_loadu_epi16(inside, row + d);
            _mm256_mask_storeu_epi16(
                tile + d / TILE_DEPTH * TILE_VALUES + d % TILE_DEPTH, inside, part);
            sum = _mm512_add_ps(sum, widen(part));
        }
        const float mean = _mm512_reduce_add_ps(sum) / static_cast<float>(width);
        __m512 squares = _mm512_setzero_ps();
        for (int64_t d = 0; d < width; d += LANES) {
            const __mmask16 inside = lanes_below(width, d);
            const __m512 value = widen(_mm256_maskz_loadu_epi16(inside, row + d));
            const __m512 off = _mm512_maskz_sub_ps(inside, value, _mm512_set1_ps(mean));
            squares = _mm512_fmadd_ps(off, off, squares);
        }
        const float variance = _mm512_reduce_add_ps(squares) / static_cast<float>(width);
        rstd[m] = std::isfinite(variance) ? 1.0f / std::sqrt(variance + eps) : NAN;
    }
}

struct Best {
    float value;
    int32_t place;
};

// The largest of one value a lane; of equals the lowest class.
Best best_of_lanes(__m512 values, __m512i places) {
    const float value = _mm512_reduce_max_ps(values);
    const __mmask16 equal = _mm512_cmp_ps_mask(values, _mm512_set1_ps(value), _CMP_EQ_OQ);
    return {value, _mm512_mask_reduce_min_epi32(equal, places)};
}

// The first of the classes that come after `last` in descending order, ties to the lower class.
Best best_after(const float* logits, int64_t classes, Best last) {
    const __m512 bound = _mm512_set1_ps(last.value);
    const __m512i place = _mm512_set1_epi32(last.place);
    __m512 best = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    __m512i best_place = _mm512_set1_epi32(std::numeric_limits<int32_t>::max());
    __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t c = 0; c < classes; c += LANES) {
        const __mmask16 inside = lanes_below(classes, c);
        const __m512 value = _mm512_maskz_loadu_ps(inside, logits + c);
        const __mmask16 behind = _mm512_mask_cmp_ps_mask(inside, value, bound, _CMP_LT_OQ) |
            (_mm512_mask_cmp_ps_mask(inside, value, bound, _CMP_EQ_OQ) &
             _mm512_cmpgt_epi32_mask(places, place));
        const __mmask16 better = _mm512_mask_cmp_ps_mask(behind, value, best, _CMP_GT_OQ);
        best = _mm512_mask_mov_ps(best, better, value);
        best_place = _mm512_mask_mov_epi32(best_place, better, places);
        places = _mm512_add_epi32(places, _mm512_set1_epi32(LANES));
    }
    return best_of_lanes(best, best_place);
}

// Logits in place of a row's products; returns the label's rank, and the first class in `best`.
int32_t rank_of(float* row, const float* bias, int64_t classes, float rstd, int32_t label,
                Best* best) {
    const __m512 scale = _mm512_set1_ps(rstd);
    const float label_logit = std::fma(row[label], rstd, bias[label]);
    const __m512 bound = _mm512_set1_ps(label_logit);
    __m512 peak = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    __m512i peak_place = _mm512_set1_epi32(std::numeric_limits<int32_t>::max());
    __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int32_t rank = 0;
    for (int64_t c = 0; c < classes; c += LANES) {
        const __mmask16 inside = lanes_below(classes, c);
        const __m512 logit = _mm512_fmadd_ps(
            _mm512_maskz_loadu_ps(inside, row + c), scale, _mm512_maskz_loadu_ps(inside, bias + c));
        _mm512_mask_storeu_ps(row + c, inside, logit);
        const __mmask16 above = _mm512_mask_cmp_ps_mask(inside, logit, bound, _CMP_GT_OQ);
        const __mmask16 level = _mm512_mask_cmp_ps_mask(
            inside & lanes_below(label, c), logit, bound, _CMP_EQ_OQ);
        rank += _mm_popcnt_u32(above | level);
        const __mmask16 better = _mm512_mask_cmp_ps_mask(inside, logit, peak, _CMP_GT_OQ);
        peak = _mm512_mask_mov_ps(peak, better, logit);
        peak_place = _mm512_mask_mov_epi32(peak_place, better, places);
        places = _mm512_add_epi32(places, _mm512_set1_epi32(LANES));
    }
    *best = best_of_lanes(peak, peak_place);
    return rank;
}

float logsumexp_of(const float* logits, int64_t classes, float peak) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < classes; c += LANES) {
        const __mmask16 inside = lanes_below(classes, c);
        const __m512 below = _mm512_sub_ps(
            _mm512_maskz_loadu_ps(inside, logits + c), _mm512_set1_ps(peak));
        sum = _mm512_mask_add_ps(sum, inside, sum, exp_nonpositive(below));
    }
    return peak + std::log(_mm512_reduce_add_ps(sum));
}

}  // namespace

extern "C" {

// x: bfloat16 [M, D]. packed: panels of [C, D]. labels: [M / tokens], in [0, C). rank, label_logit:
// [M]. logsumexp: [M], or null. topk: [M, K]. A row whose variance is not finite gets rank and
// classes C, and NaN.
void class_scores(const uint16_t* x, int64_t rows, int64_t width, const uint16_t* packed,
                  const float* bias, int64_t classes, float eps, const int32_t* labels,
                  int64_t tokens, int64_t kept, int64_t threads, int32_t* rank,
                  float* label_logit, float* logsumexp, int32_t* topk) {
    const int64_t depth = round_up(width, TILE_DEPTH), padded = round_up(classes, PANEL);
    on_threads(threads, [=](auto next) {
        const Tiles configured;
        const auto tiles = buffer<uint16_t>(BLOCK * depth);
        const auto products = buffer<float>(BLOCK * padded);
        float rstd[BLOCK];
        for (int64_t first; (first = next() * BLOCK) < rows;) {
            const int count = static_cast<int>(rows - first < BLOCK ? rows - first : BLOCK);
            pack_rows(x + first * width, count, width, depth, eps, tiles.get(), rstd);
            for (int64_t c = 0; c < padded; c += PANEL)
                multiply_panel(tiles.get(), BLOCK, packed + c * depth, depth, products.get() + c,
                               padded);
            for (int m = 0; m < count; ++m) {
                const int64_t row = first + m;
                float* logits = products.get() + m * padded;
                const int32_t label = labels[row / tokens];
                if (std::isnan(rstd[m])) {
                    rank[row] = static_cast<int32_t>(classes);
                    label_logit[row] = NAN;
                    if (logsumexp != nullptr) logsumexp[row] = NAN;
                    for (int64_t k = 0; k < kept; ++k)
                        topk[row * kept + k] = static_cast<int32_t>(classes);
                    continue;
                }
                Best best;
                rank[row] = rank_of(logits, bias, classes, rstd[m], label, &best);
                label_logit[row] = logits[label];
                if (logsumexp != nullptr)
                    logsumexp[row] = logsumexp_of(logits, classes, best.value);
                for (int64_t k = 0; k < kept; ++k) {
                    if (k > 0) best = best_after(logits, classes, best);
                    topk[row * kept + k] = best.place;
                }
            }
        }
    });
}

}  // extern "C"
