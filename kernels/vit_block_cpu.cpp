// A pre-norm transformer block in bfloat16 or float32 on CPUs with AMX or AVX-512, in three passes:
// LayerNorm and the projection to queries, keys and values; attention; and all that is local to a
// token after it. Compiled and called by vit_block_cpu.py.
//
// BLOCK rows go through all products of a pass while they lie in a core's second-level cache. As in
// the model run operation by operation, every product is summed in float32 and every operation's
// result is rounded to T. A row's sums do not depend on what else is in the batch.
//
// Letters: M rows, that is tokens of all images, D width, F width of the MLP, N images, T tokens,
// H heads, d width of a head. As a type, T is that of the activations: float, or uint16_t for
// bfloat16.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "class_scores_cpu.hpp"
#include "lanes.hpp"
#include "threads.hpp"
#include "tile_values.hpp"
#include "tiles.hpp"

extern "C" {

struct Norm {
    const float *weight, *bias;  // [width]
    int64_t width;
    float eps;
};

struct Linear {
    const uint16_t* weight;  // panels
    const float* bias;       // [out]
    int64_t in, out;
};

// GELU(x) = max(x, 0) - a Q(a), a = min(|x|, end), where Q, the upper tail of the normal
// distribution, is a polynomial on each of 32 equal segments of [0, end].
struct Tail {
    const float* coefficients;  // [GELU_DEGREE + 1][32], of falling powers
    float segments_per_unit, end;
};

}  // extern "C"

// What follows attention. attn, mid, keys and mlp may be null; scales, [D], too. Places of streams
// in `scoring` are negative if they are not scored.
template <typename T>
struct AfterAttention {
    const T *heads, *x;  // [M, H * d], [M, D]
    int64_t rows;
    const Linear *proj, *fc1, *fc2;
    const Norm* norm;
    const Tail* tail;
    const float *attn_scale, *mlp_scale;
    T *attn, *mid, *keys, *mlp, *resid;  // [M, D], keys [M, F]
    const ClassScoring* scoring;
    int64_t attn_stream, mid_stream, mlp_stream, resid_stream;
};

namespace {

constexpr int BLOCK = 128;  // rows that a thread takes through a pass

// Neurons of the MLP whose activations are held at a time: float32 takes three times the room.
template <typename T>
constexpr int64_t CHUNK = PARTS<T> == 1 ? 4096 : 768;

// Cubics are right to 6e-7, quartics to the last place of float32.
template <typename T>
constexpr int GELU_DEGREE = PARTS<T> == 1 ? 3 : 4;

template <int DEGREE>
class Gelu {
public:
    explicit Gelu(const Tail& tail)
        : scale_(_mm512_set1_ps(tail.segments_per_unit)), end_(_mm512_set1_ps(tail.end)) {
        for (int i = 0; i <= DEGREE; ++i) {
            near_[i] = _mm512_loadu_ps(tail.coefficients + 2 * LANES * i);
            far_[i] = _mm512_loadu_ps(tail.coefficients + 2 * LANES * i + LANES);
        }
    }
    __m512 operator()(__m512 x) const {
        const __m512 a = _mm512_min_ps(_mm512_abs_ps(x), end_);
        const __m512 place = _mm512_mul_ps(a, scale_);
        const __m512i segment = _mm512_cvttps_epi32(place);
        const __m512 t = _mm512_sub_ps(place, _mm512_cvtepi32_ps(segment));
        __m512 q = _mm512_permutex2var_ps(near_[0], segment, far_[0]);
        for (int i = 1; i <= DEGREE; ++i)
            q = _mm512_fmadd_ps(q, t, _mm512_permutex2var_ps(near_[i], segment, far_[i]));
        // The second operand is what max gives for NaN.
        return _mm512_fnmadd_ps(a, q, _mm512_max_ps(_mm512_setzero_ps(), x));
    }

private:
    __m512 scale_, end_, near_[DEGREE + 1], far_[DEGREE + 1];
};

// Rows as they are into tiles; rows behind the last are zeros.
template <typename T>
void pack_rows(const T* x, int rows, int padded, int64_t width, uint16_t* tiles) {
    const Values<T> zeros(_mm512_setzero_ps(), _mm512_setzero_ps());
    for (int m = 0; m < padded; ++m)
        for (int64_t d = 0; d < width; d += TILE_DEPTH)
            (m < rows ? Values<T>(x + m * width + d) : zeros)
                .to_tiles(tiles + place_in_tiles<T>(m, d, width));
}

// LayerNorm of rows into tiles; rows behind the last are what they were. value(m, d): 32 of a row.
template <typename T, typename Value>
void pack_normalised(const Value& value, int rows, const Norm& norm, uint16_t* tiles) {
    const float width = static_cast<float>(norm.width);
    for (int m = 0; m < rows; ++m) {
        __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
        for (int64_t d = 0; d < norm.width; d += PANEL) {
            const Values<T> x = value(m, d);
            sum = _mm512_add_ps(sum, _mm512_add_ps(x.low(), x.high()));
        }
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / width);
        for (int64_t d = 0; d < norm.width; d += PANEL) {
            const Values<T> x = value(m, d);
            const __m512 low = _mm512_sub_ps(x.low(), mean), high = _mm512_sub_ps(x.high(), mean);
            squares = _mm512_fmadd_ps(low, low, _mm512_fmadd_ps(high, high, squares));
        }
        const float variance = _mm512_reduce_add_ps(squares) / width;
        const __m512 rstd = _mm512_set1_ps(1.0f / std::sqrt(variance + norm.eps));
        const auto normalised = [&](__m512 x, int64_t d) {
            const __m512 weight = _mm512_loadu_ps(norm.weight + d);
            const __m512 bias = _mm512_loadu_ps(norm.bias + d);
            return _mm512_fmadd_ps(_mm512_mul_ps(_mm512_sub_ps(x, mean), rstd), weight, bias);
        };
        for (int64_t d = 0; d < norm.width; d += PANEL) {
            const Values<T> x = value(m, d);
            Values<T>(normalised(x.low(), d), normalised(x.high(), d + LANES))
                .to_tiles(tiles + place_in_tiles<T>(m, d, norm.width));
        }
    }
}

// Columns of a weight, of a part of its depth.
struct Panels {
    const uint16_t* weight;
    const float* bias;
    int64_t stride, depth, columns;  // stride: from panel to panel
};

template <typename T>
Panels columns_of(const Linear& linear, int64_t first, int64_t count) {
    return {linear.weight + PARTS<T> * first * linear.in, linear.bias + first,
            PARTS<T> * PANEL * linear.in, linear.in, count};
}

template <typename T>
Panels depth_of(const Linear& linear, int64_t first, int64_t count) {
    return {linear.weight + PARTS<T> * PANEL * first, linear.bias,
            PARTS<T> * PANEL * linear.in, count, linear.out};
}

// Sums of so many panels, [panels][BLOCK][32]; of more panels one takes the place of another.
struct Sums {
    float* values;
    int64_t panels;

    float* of(int64_t c) const {
        return values + c / PANEL % panels * BLOCK * PANEL;
    }
};

// Calls use(m, c, values) with each 32 outputs of each row, those of a panel while the next one is
// multiplied. adds: to the sums of other parts of the depth; otherwise two panels are enough.
template <typename T, typename Use>
void project(const uint16_t* tiles, int rows, const Panels& panels, const Sums& sums, bool adds,
             const Use& use) {
    const int padded = static_cast<int>(round_up(rows, PANEL));
    const int64_t calls = padded / PANEL * (panels.depth / TILE_DEPTH) * PRODUCTS<T>;
    const int rows_a_call = static_cast<int>((rows + calls - 1) / calls);
    const auto use_row = [&](int m, int64_t c) {
        const float *sum = sums.of(c) + m * PANEL, *bias = panels.bias + c;
        use(m, c, Values<T>(_mm512_add_ps(_mm512_load_ps(sum), _mm512_loadu_ps(bias)),
                            _mm512_add_ps(_mm512_load_ps(sum + LANES),
                                          _mm512_loadu_ps(bias + LANES))));
    };
    for (int64_t c = 0; c < panels.columns; c += PANEL) {
        int m = c > 0 ? 0 : rows;
        multiply_panel<T>(tiles, padded, panels.weight + c / PANEL * panels.stride, panels.depth,
                          sums.of(c), PANEL, adds, [&] {
                              for (const int end = std::min(m + rows_a_call, rows); m < end; ++m)
                                  use_row(m, c - PANEL);
                          });
    }
    for (int m = 0; m < rows; ++m) use_row(m, panels.columns - PANEL);
}

template <typename T, typename Use>
void project(const uint16_t* tiles, int rows, const Linear& linear, const Sums& sums,
             const Use& use) {
    project<T>(tiles, rows, columns_of<T>(linear, 0, linear.out), sums, false, use);
}

// The products of a part of the depth, added to those of the others if `adds`.
template <typename T>
void add_up(const uint16_t* tiles, int rows, const Panels& panels, const Sums& sums, bool adds) {
    for (int64_t c = 0; c < panels.columns; c += PANEL)
        multiply_panel<T>(tiles, static_cast<int>(round_up(rows, PANEL)),
                          panels.weight + c / PANEL * panels.stride, panels.depth, sums.of(c),
                          PANEL, adds, [] {});
}

// Calls work(first, count) for every BLOCK rows, on threads whose tiles are configured. `make` is
// called once a thread and returns `work`.
template <typename Make>
void on_blocks(int64_t rows, int64_t threads, const Make& make) {
    on_threads(threads, [&](auto next) {
        const Tiles configured;
        auto work = make();
        for (int64_t first; (first = next() * BLOCK) < rows;)
            work(first, static_cast<int>(std::min<int64_t>(BLOCK, rows - first)));
        _mm_sfence();  // streamed stores are ordered by nothing else
    });
}

struct Pair {
    __m512 even, odd;
};

// Two neighbouring values of each of 16 rows, at `from` and the rows' places in units of 4 bytes.
Pair gather(const uint16_t* from, __m512i places, __mmask16 inside) {
    const __m512i both =
        _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), inside, places, from, 4);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xFFFF0000)))};
}

Pair gather(const float* from, __m512i places, __mmask16 inside) {
    const __m512 zeros = _mm512_setzero_ps();
    return {_mm512_mask_i32gather_ps(zeros, inside, places, from, 4),
            _mm512_mask_i32gather_ps(zeros, inside, places, from + 1, 4)};
}

// Keys [T, d] into panels: the columns of a product with queries.
template <typename T>
void pack_keys(const T* keys, int64_t tokens, int64_t padded, int64_t depth, uint16_t* panels) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const int row = static_cast<int>(depth * sizeof(T) / 4);
    const __m512i places = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(row));
    for (int64_t t = 0; t < padded; t += TILE_ROWS) {
        uint16_t* panel = panels + PARTS<T> * (t / PANEL * PANEL * depth) +
                          t % PANEL / TILE_ROWS * TILE_VALUES;
        for (int64_t d = 0; d < depth; d += 2) {
            const Pair pair = gather(keys + t * depth + d, places, lanes_below(tokens, t));
            pair_to_panel<T>(pair.even, pair.odd,
                             panel + PARTS<T> * (d / TILE_DEPTH * 2 * TILE_VALUES) +
                                 d % TILE_DEPTH / 2 * TILE_DEPTH);
        }
    }
}

__m512 load(const uint16_t* from) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

__m512 load(const float* from) { return _mm512_loadu_ps(from); }

// Values [T, d] into panels: the columns of a product with weights of tokens.
template <typename T>
void pack_values(const T* values, int64_t tokens, int64_t padded, int64_t depth,
                 uint16_t* panels) {
    const auto part = [&](int64_t t, int64_t d) {
        return t < tokens ? load(values + t * depth + d) : _mm512_setzero_ps();
    };
    for (int64_t d = 0; d < depth; d += TILE_ROWS) {
        uint16_t* panel = panels + PARTS<T> * (d / PANEL * PANEL * padded) +
                          d % PANEL / TILE_ROWS * TILE_VALUES;
        for (int64_t t = 0; t < padded; t += 2)
            pair_to_panel<T>(part(t, d), part(t + 1, d),
                             panel + PARTS<T> * (t / TILE_DEPTH * 2 * TILE_VALUES) +
                                 t % TILE_DEPTH / 2 * TILE_DEPTH);
    }
}

// e^(scale (score - largest)) of a row of T scores, rounded into tiles, zeros behind the last;
// returns their sum before rounding.
template <typename T>
float pack_softmax(const float* scores, int64_t tokens, int64_t padded, float scale, int m,
                   uint16_t* tiles) {
    __m512 peak = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    for (int64_t t = 0; t < tokens; t += LANES)
        peak = _mm512_mask_max_ps(peak, lanes_below(tokens, t), peak, _mm512_loadu_ps(scores + t));
    const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(peak));
    const auto part = [&](int64_t t) {
        const __m512 below = _mm512_sub_ps(_mm512_loadu_ps(scores + t), largest);
        return _mm512_maskz_mov_ps(lanes_below(tokens, t),
                                   exp_nonpositive(_mm512_mul_ps(below, _mm512_set1_ps(scale))));
    };
    __m512 sum = _mm512_setzero_ps();
    for (int64_t t = 0; t < padded; t += PANEL) {
        const __m512 low = part(t), high = part(t + LANES);
        sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
        Values<T>(low, high).to_tiles(tiles + place_in_tiles<T>(m, t, padded));
    }
    return _mm512_reduce_add_ps(sum);
}

// y = linear(norm(x)). x: [M, D]. y: [3, H, M, d].
template <typename T>
void queries_keys_values(const T* x, int64_t rows, const Norm& norm, const Linear& linear,
                         int64_t head_width, int64_t threads, T* y) {
    on_blocks(rows, threads, [&] {
        return [&, tiles = buffer<uint16_t>(PARTS<T> * BLOCK * linear.in),
                space = buffer<float>(2 * BLOCK * PANEL)](int64_t first, int count) {
            const auto row = [&](int m, int64_t d) {
                return Values<T>(x + (first + m) * norm.width + d);
            };
            pack_normalised<T>(row, count, norm, tiles.get());
            project<T>(tiles.get(), count, linear, Sums{space.get(), 2},
                       [&](int m, int64_t c, const Values<T>& values) {
                           values.stream(y + (c / head_width * rows + first + m) * head_width +
                                         c % head_width);
                       });
        };
    });
}

// softmax(Q K^T / sqrt(d)) V of every head. qkv: [3, H, N, T, d]. out: [N, T, H, d].
template <typename T>
void attention(const T* qkv, int64_t images, int64_t tokens, int64_t heads, int64_t depth,
               int64_t threads, T* out) {
    const int64_t padded = round_up(tokens, PANEL), width = heads * depth;
    const int64_t part = images * tokens * width;
    const float scale = 1.0f / std::sqrt(static_cast<float>(depth));
    on_threads(threads, [=](auto next) {
        const Tiles configured;
        const auto keys = buffer<uint16_t>(PARTS<T> * padded * depth);
        const auto values = buffer<uint16_t>(PARTS<T> * padded * depth);
        const auto queries = buffer<uint16_t>(PARTS<T> * PANEL * depth);
        const auto weights = buffer<uint16_t>(PARTS<T> * PANEL * padded);
        const auto scores = buffer<float>(PANEL * padded), sums = buffer<float>(PANEL * PANEL);
        for (int64_t task; (task = next()) < images * heads;) {
            const T* query = qkv + task * tokens * depth;
            T* result = out + task % images * tokens * width + task / images * depth;
            pack_keys(query + part, tokens, padded, depth, keys.get());
            pack_values(query + 2 * part, tokens, padded, depth, values.get());
            for (int64_t first = 0; first < tokens; first += PANEL) {
                const int count = static_cast<int>(std::min<int64_t>(PANEL, tokens - first));
                pack_rows(query + first * depth, count, PANEL, depth, queries.get());
                for (int64_t t = 0; t < padded; t += PANEL)
                    multiply_panel<T>(queries.get(), PANEL, keys.get() + PARTS<T> * t * depth,
                                      depth, scores.get() + t, padded);
                float shares[PANEL];
                for (int m = 0; m < count; ++m)
                    shares[m] = 1.0f / pack_softmax<T>(scores.get() + m * padded, tokens, padded,
                                                       scale, m, weights.get());
                for (int64_t d = 0; d < depth; d += PANEL) {
                    multiply_panel<T>(weights.get(), PANEL, values.get() + PARTS<T> * d * padded,
                                      padded, sums.get(), PANEL);
                    for (int m = 0; m < count; ++m) {
                        const __m512 share = _mm512_set1_ps(shares[m]);
                        const float* sum = sums.get() + m * PANEL;
                        Values<T>(_mm512_mul_ps(_mm512_load_ps(sum), share),
                                  _mm512_mul_ps(_mm512_load_ps(sum + LANES), share))
                            .stream(result + (first + m) * width + d);
                    }
                }
            }
        }
        _mm_sfence();
    });
}

// attn = proj(heads), mid = x + attn, keys = fc1(norm(mid)), mlp = fc2(GELU(keys)),
// resid = mid + mlp; attn and mlp times their scales. Streams are scored as they lie in the cache.
template <typename T>
void after_attention(const AfterAttention<T>& a, int64_t threads) {
    const int64_t width = a.norm->width, neurons = a.fc1->out;
    const int64_t chunk = std::min(CHUNK<T>, neurons), panels = neurons > chunk ? width / PANEL : 2;
    const auto tiles_of = [](int64_t columns) {
        return buffer<uint16_t>(PARTS<T> * BLOCK * columns);
    };
    on_blocks(a.rows, threads, [&] {
        // `tiles` has what enters proj, then fc1, then the output of fc2; `stream` x, mid, resid.
        return [&, gelu = Gelu<GELU_DEGREE<T>>(*a.tail),
                tiles = tiles_of(std::max(a.proj->in, width)), stream = tiles_of(width),
                attn = tiles_of(width), hidden = tiles_of(chunk),
                space = buffer<float>((2 + panels) * BLOCK * PANEL),
                logits = buffer<float>(a.scoring == nullptr ? 0 : BLOCK * a.scoring->stride())](
                   int64_t first, int count) {
            const int padded = static_cast<int>(round_up(count, PANEL));
            const Sums sums{space.get(), 2}, over_chunks{space.get() + 2 * BLOCK * PANEL, panels};
            const auto score = [&](const uint16_t* rows, int64_t place) {
                if (place >= 0) score_tiles<T>(*a.scoring, place, rows, first, count, logits.get());
            };
            const auto streamed = [&](int m, int64_t d) {
                return Values<T>::from_tiles(stream.get() + place_in_tiles<T>(m, d, width));
            };
            pack_rows(a.x + first * width, count, padded, width, stream.get());
            pack_rows(a.heads + first * a.proj->in, count, padded, a.proj->in, tiles.get());
            project<T>(tiles.get(), count, *a.proj, sums, [&](int m, int64_t c, Values<T> added) {
                const int64_t place = (first + m) * width + c;
                const int64_t inside = place_in_tiles<T>(m, c, width);
                if (a.attn_scale != nullptr) added = scaled(added, a.attn_scale + c);
                const Values<T> mid = streamed(m, c) + added;
                added.to_tiles(attn.get() + inside);
                mid.to_tiles(stream.get() + inside);
                if (a.attn != nullptr) added.stream(a.attn + place);
                if (a.mid != nullptr) mid.stream(a.mid + place);
            });
            score(attn.get(), a.attn_stream);
            score(stream.get(), a.mid_stream);
            pack_normalised<T>(streamed, count, *a.norm, tiles.get());
            const auto finish = [&](int m, int64_t c, Values<T> added) {
                const int64_t place = (first + m) * width + c;
                const int64_t inside = place_in_tiles<T>(m, c, width);
                if (a.mlp_scale != nullptr) added = scaled(added, a.mlp_scale + c);
                const Values<T> resid = streamed(m, c) + added;
                added.to_tiles(tiles.get() + inside);
                resid.to_tiles(stream.get() + inside);
                if (a.mlp != nullptr) added.stream(a.mlp + place);
                resid.stream(a.resid + place);
            };
            for (int64_t f = 0; f < neurons; f += chunk) {
                const int64_t held = std::min(chunk, neurons - f);
                project<T>(tiles.get(), count, columns_of<T>(*a.fc1, f, held), sums, false,
                           [&](int m, int64_t c, const Values<T>& keys) {
                               if (a.keys != nullptr)
                                   keys.stream(a.keys + (first + m) * neurons + f + c);
                               Values<T>(gelu(keys.low()), gelu(keys.high()))
                                   .to_tiles(hidden.get() + place_in_tiles<T>(m, c, held));
                           });
                const Panels fc2 = depth_of<T>(*a.fc2, f, held);
                if (f + held < neurons)
                    add_up<T>(hidden.get(), count, fc2, over_chunks, f > 0);
                else
                    project<T>(hidden.get(), count, fc2, over_chunks, f > 0, finish);
            }
            score(tiles.get(), a.mlp_stream);
            score(stream.get(), a.resid_stream);
        };
    });
}

}  // namespace

extern "C" {

void queries_keys_values_bfloat16(const uint16_t* x, int64_t rows, const Norm* norm,
                                  const Linear* linear, int64_t head_width, int64_t threads,
                                  uint16_t* y) {
    queries_keys_values(x, rows, *norm, *linear, head_width, threads, y);
}

void queries_keys_values_float32(const float* x, int64_t rows, const Norm* norm,
                                 const Linear* linear, int64_t head_width, int64_t threads,
                                 float* y) {
    queries_keys_values(x, rows, *norm, *linear, head_width, threads, y);
}

void attention_bfloat16(const uint16_t* qkv, int64_t images, int64_t tokens, int64_t heads,
                        int64_t depth, int64_t threads, uint16_t* out) {
    attention(qkv, images, tokens, heads, depth, threads, out);
}

void attention_float32(const float* qkv, int64_t images, int64_t tokens, int64_t heads,
                       int64_t depth, int64_t threads, float* out) {
    attention(qkv, images, tokens, heads, depth, threads, out);
}

void after_attention_bfloat16(const AfterAttention<uint16_t>* all, int64_t threads) {
    after_attention(*all, threads);
}

void after_attention_float32(const AfterAttention<float>* all, int64_t threads) {
    after_attention(*all, threads);
}

}  // extern "C"
