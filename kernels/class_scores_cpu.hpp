// Class scoring of rows that lie in tiles, for the C++ kernels beside it: projection, rank, label
// logit, logsumexp and top classes.
//
// The rows' logits stay in the second-level cache until the same thread has reduced them; that of
// the label is one of them, so no other sum can disagree with it.
//
// Letters: N images, S streams, T tokens, D width, C classes, K top classes.

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "lanes.hpp"
#include "tile_values.hpp"
#include "tiles.hpp"

// Of a batch's streams. A row whose variance is not finite gets rank and classes C, and NaN.
struct ClassScoring {
    const uint16_t* weight;  // panels of [C, D]
    const float* bias;       // [C]
    int64_t classes, width;
    const int32_t* labels;  // [N], in [0, C)
    int64_t streams, tokens, kept;
    float eps;
    int32_t* rank;                   // [N, S, T]
    float *label_logit, *logsumexp;  // [N, S, T]; logsumexp may be null
    int32_t* topk;                   // [N, S, T, K]

    int64_t depth() const { return round_up(width, TILE_DEPTH); }
    // Of a row's logits; not a multiple of the first-level cache's ways.
    int64_t stride() const { return round_up(classes, PANEL) + LANES; }
};

// 1 / sqrt(variance + eps) of a row among tiles; NaN where the variance is not finite.
template <typename T>
float row_rstd(const uint16_t* tiles, int m, int64_t width, float eps) {
    const int64_t depth = round_up(width, TILE_DEPTH);
    const auto values = [&](int64_t d) {
        return Values<T>::from_tiles(tiles + place_in_tiles<T>(m, d, depth));
    };
    __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    for (int64_t d = 0; d < width; d += TILE_DEPTH)
        sum = _mm512_add_ps(sum, _mm512_add_ps(values(d).low(), values(d).high()));
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / static_cast<float>(width));
    for (int64_t d = 0; d < width; d += TILE_DEPTH) {
        const __m512 low =
            _mm512_maskz_sub_ps(lanes_below(width, d), values(d).low(), mean);
        const __m512 high =
            _mm512_maskz_sub_ps(lanes_below(width, d + LANES), values(d).high(), mean);
        squares = _mm512_fmadd_ps(low, low, _mm512_fmadd_ps(high, high, squares));
    }
    const float variance = _mm512_reduce_add_ps(squares) / static_cast<float>(width);
    return std::isfinite(variance) ? 1.0f / std::sqrt(variance + eps) : NAN;
}

struct Best {
    float value;
    int32_t place;
};

// The largest of one value a lane; of equals the lowest class.
inline Best best_of_lanes(__m512 values, __m512i places) {
    const float value = _mm512_reduce_max_ps(values);
    const __mmask16 equal = _mm512_cmp_ps_mask(values, _mm512_set1_ps(value), _CMP_EQ_OQ);
    return {value, _mm512_mask_reduce_min_epi32(equal, places)};
}

// The first of the classes that come after `last` in descending order, ties to the lower class.
inline Best best_after(const float* logits, int64_t classes, Best last) {
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
inline int32_t rank_of(float* row, const float* bias, int64_t classes, float rstd, int32_t label,
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

inline float logsumexp_of(const float* logits, int64_t classes, float peak) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < classes; c += LANES) {
        const __mmask16 inside = lanes_below(classes, c);
        const __m512 below = _mm512_sub_ps(
            _mm512_maskz_loadu_ps(inside, logits + c), _mm512_set1_ps(peak));
        sum = _mm512_mask_add_ps(sum, inside, sum, exp_nonpositive(below));
    }
    return peak + std::log(_mm512_reduce_add_ps(sum));
}

// Scores `count` rows of one stream, the first of which is row `first` of the batch's N * T.
// tiles: [M, D] filled up to multiples of 32; what is in the rows behind the last does not matter.
// logits: [M, stride()], scratch.
template <typename T>
void score_tiles(const ClassScoring& to, int64_t stream, const uint16_t* tiles, int64_t first,
                 int count, float* logits) {
    const int64_t depth = to.depth(), stride = to.stride();
    const int rows = static_cast<int>(round_up(count, PANEL));
    for (int64_t c = 0; c < to.classes; c += PANEL)
        multiply_panel<T>(tiles, rows, to.weight + PARTS<T> * c * depth, depth, logits + c, stride);
    for (int m = 0; m < count; ++m, logits += stride) {
        const int64_t image = (first + m) / to.tokens, token = (first + m) % to.tokens;
        const int64_t place = (image * to.streams + stream) * to.tokens + token;
        const int32_t label = to.labels[image];
        int32_t* topk = to.topk + place * to.kept;
        const float rstd = row_rstd<T>(tiles, m, to.width, to.eps);
        if (std::isnan(rstd)) {
            to.rank[place] = static_cast<int32_t>(to.classes);
            to.label_logit[place] = NAN;
            if (to.logsumexp != nullptr) to.logsumexp[place] = NAN;
            for (int64_t k = 0; k < to.kept; ++k) topk[k] = static_cast<int32_t>(to.classes);
            continue;
        }
        Best best;
        to.rank[place] = rank_of(logits, to.bias, to.classes, rstd, label, &best);
        to.label_logit[place] = logits[label];
        if (to.logsumexp != nullptr)
            to.logsumexp[place] = logsumexp_of(logits, to.classes, best.value);
        for (int64_t k = 0; k < to.kept; ++k) {
            if (k > 0) best = best_after(logits, to.classes, best);
            topk[k] = best.place;
        }
    }
}
