// Products in the vector registers of CPUs with AVX-512, which multiply float32, and bfloat16 where
// there is AVX512_BF16; both add up float32. Part of tiles.hpp.
//
// bfloat16 (uint16_t) is held as itself. The two parts of 32 float32 values of a row are its
// halves; those of two neighbouring values of a column are the first and the second.

#pragma once

#include <cstring>

#include "lanes.hpp"

template <>
inline constexpr int PARTS<float> = 2;

// Calls of `meanwhile` below for every 32 rows and 32 values of the depth.
template <typename T>
constexpr int PRODUCTS = 1;

constexpr int GROUP = 8;  // rows whose sums with the columns of a panel are in registers

// There are no tile registers to configure.
struct Tiles {
    Tiles() {}
};

template <typename Value>
Value read(const void* from) {
    Value value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

using GroupSums = __m512[GROUP][2];

// Adds the products of a group's rows and of 32 columns, over 32 values of the depth.
template <typename T>
void multiply_step(const uint16_t* rows, const uint16_t* columns, GroupSums& sums);

template <>
inline void multiply_step<uint16_t>(const uint16_t* rows, const uint16_t* columns,
                                    GroupSums& sums) {
#pragma GCC unroll 4
    for (int pair = 0; pair < TILE_ROWS; ++pair, rows += 2, columns += TILE_DEPTH) {
        const __m512bh low = (__m512bh)_mm512_load_si512(columns);
        const __m512bh high = (__m512bh)_mm512_load_si512(columns + TILE_VALUES);
#pragma GCC unroll 8
        for (int m = 0; m < GROUP; ++m) {
            const __m512bh both = (__m512bh)_mm512_set1_epi32(read<int>(rows + m * TILE_DEPTH));
            sums[m][0] = _mm512_dpbf16_ps(sums[m][0], both, low);
            sums[m][1] = _mm512_dpbf16_ps(sums[m][1], both, high);
        }
    }
}

template <>
inline void multiply_step<float>(const uint16_t* rows, const uint16_t* columns, GroupSums& sums) {
#pragma GCC unroll 4
    for (int d = 0; d < TILE_DEPTH; ++d) {
        const uint16_t* places = rows + d / LANES * TILE_VALUES + d % LANES * 2;
        const uint16_t* pair = columns + d / 2 * TILE_DEPTH + d % 2 * 2 * TILE_VALUES;
        const __m512 low = _mm512_load_ps(pair), high = _mm512_load_ps(pair + TILE_VALUES);
#pragma GCC unroll 8
        for (int m = 0; m < GROUP; ++m) {
            const __m512 value = _mm512_set1_ps(read<float>(places + m * TILE_DEPTH));
            sums[m][0] = _mm512_fmadd_ps(value, low, sums[m][0]);
            sums[m][1] = _mm512_fmadd_ps(value, high, sums[m][1]);
        }
    }
}

// out[m * stride + c]: the products of so many rows, a multiple of 32, with the columns of a panel;
// added to what is there if `adds`. meanwhile(): called PRODUCTS times for every 32 rows and 32
// values of the depth.
template <typename T, typename Meanwhile>
void multiply_panel(const uint16_t* tiles, int rows, const uint16_t* panel, int64_t depth,
                    float* out, int64_t stride, bool adds, Meanwhile&& meanwhile) {
    for (int m = 0; m < rows; m += GROUP, out += GROUP * stride) {
        GroupSums sums;
#pragma GCC unroll 8
        for (int i = 0; i < GROUP; ++i) {
            const float* row = out + i * stride;
            sums[i][0] = adds ? _mm512_loadu_ps(row) : _mm512_setzero_ps();
            sums[i][1] = adds ? _mm512_loadu_ps(row + LANES) : _mm512_setzero_ps();
        }
        for (int64_t d = 0; d < depth; d += TILE_DEPTH)
            multiply_step<T>(tiles + place_in_tiles<T>(m, d, depth), panel + PARTS<T> * PANEL * d,
                             sums);
#pragma GCC unroll 8
        for (int i = 0; i < GROUP; ++i) {
            _mm512_storeu_ps(out + i * stride, sums[i][0]);
            _mm512_storeu_ps(out + i * stride + LANES, sums[i][1]);
        }
    }
    const int64_t calls = rows / PANEL * (depth / TILE_DEPTH) * PRODUCTS<T>;
    for (int64_t call = 0; call < calls; ++call) meanwhile();
}
