// Products in the tile registers of CPUs with AMX, bfloat16 with float32 sums, for the C++ kernels
// beside it.
//
// Rows [M, D] are held as tiles [M / 16][D / 32][16][32]. Columns, that is the rows of a weight
// [C, D], are held as panels [C / 32][D / 32][2][16][32], where a tile's row has two neighbouring
// values of each of 16 columns. All of these sizes are multiples of 32, filled up with zeros.

#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <memory>

constexpr int TILE_ROWS = 16;    // rows of a tile register
constexpr int TILE_DEPTH = 32;   // bfloat16 values of a tile's row
constexpr int TILE_VALUES = TILE_ROWS * TILE_DEPTH;
constexpr int PANEL = 32;        // rows or columns of a 2 x 2 group of accumulator tiles

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
        asm volatile("" : : "r"(&before_) : "memory");
        TileConfig config;
        for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = TILE_ROWS;
        // GCC's intrinsic reads no more than 8 bytes, as far as GCC knows.
        asm volatile("" : : "r"(&config) : "memory");
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

inline int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

// Where the 32 values from column d on, a multiple of 32, of row m lie among tiles of that depth.
inline int64_t place_in_tiles(int64_t m, int64_t d, int64_t depth) {
    return m / TILE_ROWS * TILE_ROWS * depth + d * TILE_ROWS + m % TILE_ROWS * TILE_DEPTH;
}

// Into the first-level cache, a tile that is loaded soon.
inline void prefetch_tile(const uint16_t* tile) {
    for (int row = 0; row < TILE_ROWS; ++row)
        _mm_prefetch(reinterpret_cast<const char*>(tile + row * TILE_DEPTH), _MM_HINT_T0);
}

// out[m * stride + c]: the products of so many rows, a multiple of 32, with the columns of a panel.
// meanwhile(): called for every 32 rows and 32 values of the depth; what it does in vector registers
// takes no time of the tile registers.
template <typename Meanwhile>
void multiply_panel(const uint16_t* tiles, int rows, const uint16_t* panel, int64_t depth,
                    float* out, int64_t stride, Meanwhile&& meanwhile) {
    // A tile is loaded for each tile product, and waits for the second-level cache otherwise. What is
    // fetched behind the end is mostly what comes next.
    constexpr int AHEAD = 2 * TILE_VALUES;
    const int64_t values = depth * TILE_ROWS;
    for (int m = 0; m < rows; m += PANEL, out += PANEL * stride) {
        const uint16_t* upper = tiles + m * depth;
        const uint16_t* lower = upper + values;
        const uint16_t *left = panel, *right = panel + TILE_VALUES;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (const uint16_t* end = lower; upper < end; upper += TILE_VALUES, lower += TILE_VALUES,
                             left += 2 * TILE_VALUES, right += 2 * TILE_VALUES) {
            _tile_loadd(4, upper, 64);
            _tile_loadd(6, left, 64);
            _tile_loadd(7, right, 64);
            prefetch_tile(upper + AHEAD);
            _tile_dpbf16ps(0, 4, 6);
            prefetch_tile(left + 2 * AHEAD);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, lower, 64);
            prefetch_tile(lower + AHEAD);
            _tile_dpbf16ps(2, 5, 6);
            prefetch_tile(right + 2 * AHEAD);
            _tile_dpbf16ps(3, 5, 7);
            meanwhile();
        }
        _tile_stored(0, out, stride * sizeof(float));
        _tile_stored(1, out + TILE_ROWS, stride * sizeof(float));
        _tile_stored(2, out + TILE_ROWS * stride, stride * sizeof(float));
        _tile_stored(3, out + TILE_ROWS * stride + TILE_ROWS, stride * sizeof(float));
    }
}

inline void multiply_panel(const uint16_t* tiles, int rows, const uint16_t* panel, int64_t depth,
                           float* out, int64_t stride) {
    multiply_panel(tiles, rows, panel, depth, out, stride, [] {});
}

// Asks Linux for the tile registers, which a process does not have from the start; 0 if granted.
extern "C" long request_tiles() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}
