// Tile registers of CPUs with AMX, emulated by vectors: included before a source whose own
// intrinsics it replaces. As there, products of even and of odd places are added up apart before
// they are added to a tile, and without a configuration the process dies.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct alignas(64) Tile {
    uint8_t rows[16][64];
};

inline thread_local Tile tiles[8];
inline thread_local uint8_t config[64];

inline Tile& tile_of(int tile) {
    constexpr int ROW_BYTES = 16, ROWS = 48;  // places in a configuration
    uint16_t row_bytes;
    std::memcpy(&row_bytes, config + ROW_BYTES + 2 * tile, 2);
    if (config[0] != 1 || row_bytes != 64 || config[ROWS + tile] != 16) std::abort();
    return tiles[tile];
}

inline void zero(int tile) { std::memset(tile_of(tile).rows, 0, sizeof(Tile)); }

inline void load(int tile, const void* from, int64_t stride) {
    for (int row = 0; row < 16; ++row)
        std::memcpy(tile_of(tile).rows[row], static_cast<const uint8_t*>(from) + row * stride, 64);
}

inline void store(int tile, void* to, int64_t stride) {
    for (int row = 0; row < 16; ++row)
        std::memcpy(static_cast<uint8_t*>(to) + row * stride, tile_of(tile).rows[row], 64);
}

inline void multiply(int to, int left, int right) {
    Tile &sums = tile_of(to), &values = tile_of(left), &columns = tile_of(right);
    const __m512i upper = _mm512_set1_epi32(0xFFFF0000);
    for (int row = 0; row < 16; ++row) {
        __m512 even = _mm512_setzero_ps(), odd = even;
        for (int pair = 0; pair < 16; ++pair) {
            uint32_t both;
            std::memcpy(&both, values.rows[row] + 4 * pair, 4);
            const __m512i left_pair = _mm512_set1_epi32(both);
            const __m512i right_pair = _mm512_load_si512(columns.rows[pair]);
            even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(left_pair, 16)),
                                   _mm512_castsi512_ps(_mm512_slli_epi32(right_pair, 16)), even);
            odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(left_pair, upper)),
                                  _mm512_castsi512_ps(_mm512_and_si512(right_pair, upper)), odd);
        }
        float* sum = reinterpret_cast<float*>(sums.rows[row]);
        _mm512_store_ps(sum, _mm512_add_ps(_mm512_load_ps(sum), _mm512_add_ps(even, odd)));
    }
}

}  // namespace emulated

#define _tile_loadconfig(from) std::memcpy(emulated::config, from, 64)
#define _tile_storeconfig(to) std::memcpy(to, emulated::config, 64)
#define _tile_release() std::memset(emulated::config, 0, 64)
#define _tile_zero(tile) emulated::zero(tile)
#define _tile_loadd(tile, from, stride) emulated::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated::store(tile, to, stride)
#define _tile_dpbf16ps(to, left, right) emulated::multiply(to, left, right)

#define __AMX_BF16__ 1
