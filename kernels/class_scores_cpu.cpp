// Class scoring on CPUs with AMX or AVX-512, in bfloat16 and float32: LayerNorm statistics,
// projection and reductions in one pass. Compiled and called by class_scores_cpu.py.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "class_scores_cpu.hpp"
#include "lanes.hpp"
#include "threads.hpp"
#include "tile_values.hpp"
#include "tiles.hpp"

namespace {

constexpr int BLOCK = 64;  // rows whose logits are held by a thread

// Rows into tiles, their width filled up with zeros; what is behind them stays what it was.
template <typename T>
void pack_rows(const T* x, int rows, int64_t width, int64_t depth, uint16_t* tiles) {
    for (int m = 0; m < rows; ++m)
        for (int64_t d = 0; d < width; d += TILE_DEPTH) {
            const T* values = x + m * width + d;
            T last[TILE_DEPTH] = {};
            if (d + TILE_DEPTH > width) {
                std::copy_n(values, width - d, last);
                values = last;
            }
            Values<T>(values).to_tiles(tiles + place_in_tiles<T>(m, d, depth));
        }
}

// x: [N * T, D], of one stream.
template <typename T>
void score(const T* x, int64_t rows, const ClassScoring* to, int64_t threads) {
    on_threads(threads, [=](auto next) {
        const Tiles configured;
        const auto tiles = buffer<uint16_t>(PARTS<T> * BLOCK * to->depth());
        const auto logits = buffer<float>(BLOCK * to->stride());
        for (int64_t first; (first = next() * BLOCK) < rows;) {
            const int count = static_cast<int>(std::min<int64_t>(BLOCK, rows - first));
            pack_rows(x + first * to->width, count, to->width, to->depth(), tiles.get());
            score_tiles<T>(*to, 0, tiles.get(), first, count, logits.get());
        }
    });
}

}  // namespace

extern "C" {

void class_scores_bfloat16(const uint16_t* x, int64_t rows, const ClassScoring* to,
                           int64_t threads) {
    score(x, rows, to, threads);
}

void class_scores_float32(const float* x, int64_t rows, const ClassScoring* to, int64_t threads) {
    score(x, rows, to, threads);
}

}  // extern "C"
