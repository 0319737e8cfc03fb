// Class scoring in bfloat16 on CPUs with AMX: LayerNorm statistics, projection and reductions in one
// pass. Compiled and called by class_scores_amx.py.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "amx.hpp"
#include "class_scores_amx.hpp"
#include "lanes.hpp"
#include "threads.hpp"

namespace {

constexpr int BLOCK = 64;  // rows whose logits are held by a thread

// Rows into tiles; what is behind them stays what it was.
void pack_rows(const uint16_t* x, int rows, int64_t width, int64_t depth, uint16_t* tiles) {
    for (int m = 0; m < rows; ++m)
        for (int64_t d = 0; d < width; d += TILE_DEPTH)
            std::memcpy(tiles + place_in_tiles(m, d, depth), x + m * width + d,
                        sizeof(uint16_t) * std::min<int64_t>(TILE_DEPTH, width - d));
}

}  // namespace

// x: bfloat16 [N * T, D], of one stream.
extern "C" void class_scores(const uint16_t* x, int64_t rows, const ClassScoring* to,
                             int64_t threads) {
    on_threads(threads, [=](auto next) {
        const Tiles configured;
        const auto tiles = buffer<uint16_t>(BLOCK * to->depth());
        std::fill_n(tiles.get(), BLOCK * to->depth(), 0);
        const auto logits = buffer<float>(BLOCK * to->stride());
        for (int64_t first; (first = next() * BLOCK) < rows;) {
            const int count = static_cast<int>(std::min<int64_t>(BLOCK, rows - first));
            pack_rows(x + first * to->width, count, to->width, to->depth(), tiles.get());
            score_tiles(*to, 0, tiles.get(), first, count, logits.get());
        }
    });
}
