// 32 neighbouring values of a row, in memory as T and as parts among tiles; pairs in panels.

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "lanes.hpp"
#include "tiles.hpp"

template <typename T>
class Values;

// bfloat16; made of float32, they are rounded.
template <>
class Values<uint16_t> {
public:
    Values(__m512 low, __m512 high) : bits_((__m512i)_mm512_cvtne2ps_pbh(high, low)) {}
    explicit Values(const uint16_t* from) : bits_(_mm512_loadu_si512(from)) {}
    static Values from_tiles(const uint16_t* place) { return Values(place); }

    __m512 low() const { return widen(_mm512_castsi512_si256(bits_)); }
    __m512 high() const { return widen(_mm512_extracti64x4_epi64(bits_, 1)); }
    void to_tiles(uint16_t* place) const { _mm512_store_si512(place, bits_); }
    // Past the caches: a store to a line that is not in them would wait until it is read.
    void stream(uint16_t* to) const { _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bits_); }

private:
    __m512i bits_;
};

template <>
class Values<float> {
public:
    Values(__m512 low, __m512 high) : low_(low), high_(high) {}
    explicit Values(const float* from)
        : low_(_mm512_loadu_ps(from)), high_(_mm512_loadu_ps(from + LANES)) {}
    static Values from_tiles(const uint16_t* place);

    __m512 low() const { return low_; }
    __m512 high() const { return high_; }
    void to_tiles(uint16_t* place) const;
    void stream(float* to) const {
        _mm512_stream_ps(to, low_);
        _mm512_stream_ps(to + LANES, high_);
    }

private:
    __m512 low_, high_;
};

template <typename T>
Values<T> operator+(const Values<T>& a, const Values<T>& b) {
    return {_mm512_add_ps(a.low(), b.low()), _mm512_add_ps(a.high(), b.high())};
}

template <typename T>
Values<T> scaled(const Values<T>& values, const float* by) {
    return {_mm512_mul_ps(values.low(), _mm512_loadu_ps(by)),
            _mm512_mul_ps(values.high(), _mm512_loadu_ps(by + LANES))};
}

// Two neighbouring values of each of 16 columns into a row of a panel's tiles.
template <typename T>
void pair_to_panel(__m512 even, __m512 odd, uint16_t* place);

template <>
inline void pair_to_panel<uint16_t>(__m512 even, __m512 odd, uint16_t* place) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
    _mm512_store_si512(place, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

#ifdef __AMX_BF16__

inline Values<float> Values<float>::from_tiles(const uint16_t* place) {
    Values sum(_mm512_setzero_ps(), _mm512_setzero_ps());
    for (int part = PARTS<float> - 1; part >= 0; --part) {
        const Values<uint16_t> values(place + part * TILE_VALUES);
        sum.low_ = _mm512_add_ps(sum.low_, values.low());
        sum.high_ = _mm512_add_ps(sum.high_, values.high());
    }
    return sum;
}

inline void Values<float>::to_tiles(uint16_t* place) const {
    Values rest = *this;
    for (int part = 0; part < PARTS<float>; ++part) {
        const Values<uint16_t> rounded(rest.low_, rest.high_);
        rounded.to_tiles(place + part * TILE_VALUES);
        rest.low_ = _mm512_sub_ps(rest.low_, rounded.low());
        rest.high_ = _mm512_sub_ps(rest.high_, rounded.high());
    }
}

template <>
inline void pair_to_panel<float>(__m512 even, __m512 odd, uint16_t* place) {
    for (int part = 0; part < PARTS<float>; ++part) {
        pair_to_panel<uint16_t>(even, odd, place + 2 * part * TILE_VALUES);
        even = _mm512_sub_ps(even, widen((__m256i)_mm512_cvtneps_pbh(even)));
        odd = _mm512_sub_ps(odd, widen((__m256i)_mm512_cvtneps_pbh(odd)));
    }
}

#else

inline Values<float> Values<float>::from_tiles(const uint16_t* place) {
    return {_mm512_load_ps(place), _mm512_load_ps(place + TILE_VALUES)};
}

inline void Values<float>::to_tiles(uint16_t* place) const {
    _mm512_store_ps(place, low_);
    _mm512_store_ps(place + TILE_VALUES, high_);
}

template <>
inline void pair_to_panel<float>(__m512 even, __m512 odd, uint16_t* place) {
    _mm512_store_ps(place, even);
    _mm512_store_ps(place + 2 * TILE_VALUES, odd);
}

#endif
