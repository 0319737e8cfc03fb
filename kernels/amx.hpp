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

// out[m * stride + c]: the products of so many rows, a multiple of 32, with the columns of a panel.
inline void multiply_panel(const uint16_t* tiles, int rows, const uint16_t* panel, int64_t depth,
                           float* out, int64_t stride) {
    const int64_t steps = depth / TILE_DEPTH;
    for (int m = 0; m < rows; m += PANEL, out += PANEL * stride) {
        const uint16_t* upper = tiles + m * depth;
        const uint16_t* lower = upper + TILE_ROWS * depth;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t s = 0; s < steps; ++s) {
            _tile_loadd(4, upper + s * TILE_VALUES, 64);
            _tile_loadd(6, panel + 2 * s * TILE_VALUES, 64);
            _tile_loadd(7, panel + (2 * s + 1) * TILE_VALUES, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, lower + s * TILE_VALUES, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, out, stride * sizeof(float));
        _tile_stored(1, out + TILE_ROWS, stride * sizeof(float));
        _tile_stored(2, out + TILE_ROWS * stride, stride * sizeof(float));
        _tile_stored(3, out + TILE_ROWS * stride + TILE_ROWS, stride * sizeof(float));
    }
}

// Asks Linux for the tile registers, which a process does not have from the start; 0 if granted.
extern "C" long request_tiles() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}
