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
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>

#include "lanes.hpp"
#include "threads.hpp"

namespace {

constexpr int TILE_ROWS = 16;    // rows of a tile register
constexpr int TILE_DEPTH = 32;   // bfloat16 values of a tile's row
constexpr int TILE_VALUES = TILE_ROWS * TILE_DEPTH;
constexpr int PANEL = 32;        // rows or classes of a 2 x 2 group of accumulator tiles
constexpr int BLOCK = 64;        // rows whose logits are held by a thread
constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Eight tiles of 16 rows of 64 bytes while it lives; then whatever the thread had before, for
// oneDNN remembers what it configured.
class Tiles {
public:
    Tiles() {
        _tile_storeconfig(&before_);
        TileConfig config;
        for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = TILE_ROWS;
        _tile_loadconfig(&config);
    }
    ~Tiles() {
        if (before_.palette != 0) _tile_loadconfig(&before_);
        else _tile_release();
    }

private:
    TileConfig before_;
};

template <typename T>
std::unique_ptr<T[], void (*)(void*)> buffer(size_t count) {
    return {static_cast<T*>(_mm_malloc(count * sizeof(T), 64)), _mm_free};
}

// e^x of x <= 0, relative error below 3 * 2^-24; 0 below -87.
__m512 exp_nonpositive(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);  // ln 2 in two parts
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);  // minimax polynomial of Cephes' expf
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    const __mmask16 counts = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_GE_OQ);
    return _mm512_maskz_scalef_ps(counts, p, n);
}

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

// products[m][c] of BLOCK rows and all classes.
void multiply(const uint16_t* tiles, const uint16_t* weight, int64_t depth, int64_t padded,
              float* products) {
    const int64_t steps = depth / TILE_DEPTH, stride = padded * sizeof(float);
    for (int64_t c = 0; c < padded; c += PANEL) {
        const uint16_t* columns = weight + c * depth;
        for (int m = 0; m < BLOCK; m += PANEL) {
            const uint16_t* upper = tiles + m * depth;
            const uint16_t* lower = upper + TILE_ROWS * depth;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t s = 0; s < steps; ++s) {
                _tile_loadd(4, upper + s * TILE_VALUES, 64);
                _tile_loadd(6, columns + 2 * s * TILE_VALUES, 64);
                _tile_loadd(7, columns + (2 * s + 1) * TILE_VALUES, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, lower + s * TILE_VALUES, 64);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            float* out = products + m * padded + c;
            _tile_stored(0, out, stride);
            _tile_stored(1, out + TILE_ROWS, stride);
            _tile_stored(2, out + TILE_ROWS * padded, stride);
            _tile_stored(3, out + TILE_ROWS * padded + TILE_ROWS, stride);
        }
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

// Asks Linux for the tile registers, which a process does not have from the start; 0 if granted.
long request_tiles() { return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA); }

// Weight rows, bfloat16 [C, D], into the tiles that the products take, [Cp / 32][Dp / 32][2][16][32]:
// a tile's row holds two neighbouring values of each of 16 classes. `packed` is zeros before.
void pack_weight(const uint16_t* weight, int64_t classes, int64_t width, uint16_t* packed) {
    const int64_t depth = (width + TILE_DEPTH - 1) / TILE_DEPTH * TILE_DEPTH;
    for (int64_t c = 0; c < classes; ++c) {
        uint16_t* panel = packed + c / PANEL * PANEL * depth + c % PANEL / TILE_ROWS * TILE_VALUES;
        for (int64_t d = 0; d < width; ++d) {
            const int64_t in_tile = d % TILE_DEPTH;
            panel[d / TILE_DEPTH * 2 * TILE_VALUES + in_tile / 2 * TILE_DEPTH +
                  c % TILE_ROWS * 2 + in_tile % 2] = weight[c * width + d];
        }
    }
}

// x: bfloat16 [M, D]. packed: of pack_weight. labels: [M / tokens], in [0, C). rank, label_logit:
// [M]. logsumexp: [M], or null. topk: [M, K]. A row whose variance is not finite gets rank and
// classes C, and NaN.
void class_scores(const uint16_t* x, int64_t rows, int64_t width, const uint16_t* packed,
                  const float* bias, int64_t classes, float eps, const int32_t* labels,
                  int64_t tokens, int64_t kept, int64_t threads, int32_t* rank,
                  float* label_logit, float* logsumexp, int32_t* topk) {
    const int64_t depth = (width + TILE_DEPTH - 1) / TILE_DEPTH * TILE_DEPTH;
    const int64_t padded = (classes + PANEL - 1) / PANEL * PANEL;
    on_threads(threads, [=](auto next) {
        const Tiles configured;
        const auto tiles = buffer<uint16_t>(BLOCK * depth);
        const auto products = buffer<float>(BLOCK * padded);
        float rstd[BLOCK];
        for (int64_t first; (first = next() * BLOCK) < rows;) {
            const int count = static_cast<int>(rows - first < BLOCK ? rows - first : BLOCK);
            pack_rows(x + first * width, count, width, depth, eps, tiles.get(), rstd);
            multiply(tiles.get(), packed, depth, padded, products.get());
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
