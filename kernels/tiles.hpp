// Rows and columns in tiles, the operands of the products of the C++ kernels beside it.
//
// A value of type T takes the room of PARTS<T> values in bfloat16, and lies as those units want it
// that multiply: see tiles_amx.hpp and tiles_avx512.hpp, of which a library has one.
//
// Rows [M, D] are held as tiles [M / 16][D / 32][PARTS][16][32]. Columns, that is the rows of a
// weight [C, D], are held as panels [C / 32][D / 32][PARTS][2][16][32], where a tile's row has two
// neighbouring values of each of 16 columns. All of these sizes are multiples of 32, filled up with
// zeros.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <memory>

constexpr int TILE_ROWS = 16;
constexpr int TILE_DEPTH = 32;   // bfloat16 values of a tile's row
constexpr int TILE_VALUES = TILE_ROWS * TILE_DEPTH;
constexpr int PANEL = 32;        // rows or columns of a group of two tiles

template <typename T>
std::unique_ptr<T[], void (*)(void*)> buffer(size_t count) {
    return {static_cast<T*>(_mm_malloc(count * sizeof(T), 64)), _mm_free};
}

inline int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

template <typename T>
constexpr int PARTS = 1;

// Where the first part of the 32 values from column d on, a multiple of 32, of row m lies among
// tiles of that depth; the others follow TILE_VALUES apart.
template <typename T>
int64_t place_in_tiles(int64_t m, int64_t d, int64_t depth) {
    return PARTS<T> * (m / TILE_ROWS * TILE_ROWS * depth + d * TILE_ROWS) +
           m % TILE_ROWS * TILE_DEPTH;
}

#ifdef __AMX_BF16__
#include "tiles_amx.hpp"
#else
#include "tiles_avx512.hpp"
#endif

template <typename T>
void multiply_panel(const uint16_t* tiles, int rows, const uint16_t* panel, int64_t depth,
                    float* out, int64_t stride) {
    multiply_panel<T>(tiles, rows, panel, depth, out, stride, false, [] {});
}
