// Products in the tile registers of CPUs with AMX, which multiply bfloat16 and add up float32. Part
// of tiles.hpp.
//
// bfloat16 (uint16_t) is held as itself, float32 as three parts in bfloat16 of which it is the sum,
// each the rest of those before it, rounded. Of the nine products of the parts of two float32
// values the six larger are added up; the others are below 2^-23 of the whole [Henry, Tang,
// Heinecke 2019, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision
// computations"].

#pragma once

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

template <>
inline constexpr int PARTS<float> = 3;

// Products of tiles for 32 rows, 32 columns and 32 values of the depth, four tiles each.
template <typename T>
constexpr int PRODUCTS = PARTS<T> * (PARTS<T> + 1) / 2;

// Tiles `from` and those that come `ahead` after them: the first into a register, the others into
// the first-level cache. One is loaded for each product and would wait for the second-level cache.
#define LOAD_TILE(tile, from, ahead)                                                           \
    do {                                                                                       \
        _tile_loadd(tile, from, 64);                                                           \
        for (int row = 0; row < TILE_ROWS; ++row)                                              \
            _mm_prefetch(reinterpret_cast<const char*>((from) + (ahead) + row * TILE_DEPTH),   \
                         _MM_HINT_T0);                                                         \
    } while (false)

// out[m * stride + c]: the products of so many rows, a multiple of 32, with the columns of a panel;
// added to what is there if `adds`. meanwhile(): called PRODUCTS times for every 32 rows and 32
// values of the depth; what it does in vector registers takes no time of the tile registers.
template <typename T, typename Meanwhile>
void multiply_panel(const uint16_t* tiles, int rows, const uint16_t* panel, int64_t depth,
                    float* out, int64_t stride, bool adds, Meanwhile&& meanwhile) {
    constexpr int STEP = PARTS<T> * TILE_VALUES;
    // What is fetched behind the end is mostly what comes next.
    constexpr int AHEAD = (PARTS<T> == 1 ? 2 : 1) * STEP;
    for (int m = 0; m < rows; m += PANEL, out += PANEL * stride) {
        const uint16_t* upper = tiles + PARTS<T> * m * depth;
        const uint16_t* lower = upper + PARTS<T> * TILE_ROWS * depth;
        const uint16_t* columns = panel;
        const auto load_rows = [&](int part) {
            LOAD_TILE(4, upper + part * TILE_VALUES, AHEAD);
            LOAD_TILE(5, lower + part * TILE_VALUES, AHEAD);
        };
        const auto load_columns = [&](int part) {
            LOAD_TILE(6, columns + 2 * part * TILE_VALUES, 2 * AHEAD);
            LOAD_TILE(7, columns + (2 * part + 1) * TILE_VALUES, 2 * AHEAD);
        };
        const auto multiply = [&] {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
            meanwhile();
        };
        float *first = out, *second = out + TILE_ROWS * stride;
        if (adds) {
            _tile_loadd(0, first, stride * sizeof(float));
            _tile_loadd(1, first + TILE_ROWS, stride * sizeof(float));
            _tile_loadd(2, second, stride * sizeof(float));
            _tile_loadd(3, second + TILE_ROWS, stride * sizeof(float));
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        for (const uint16_t* end = lower; upper < end;
             upper += STEP, lower += STEP, columns += 2 * STEP) {
            load_rows(0);
            if constexpr (PARTS<T> == 1) {
                load_columns(0), multiply();
            } else {
                load_columns(2), multiply();
                load_columns(1), multiply();
                load_rows(1), multiply();
                load_columns(0), multiply();
                load_rows(2), multiply();
                load_rows(0), multiply();
            }
        }
        _tile_stored(0, first, stride * sizeof(float));
        _tile_stored(1, first + TILE_ROWS, stride * sizeof(float));
        _tile_stored(2, second, stride * sizeof(float));
        _tile_stored(3, second + TILE_ROWS, stride * sizeof(float));
    }
}
