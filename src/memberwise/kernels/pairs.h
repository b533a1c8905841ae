// One product of bfloat16 matrices. A processor that knows them multiplies two neighbours of a row by two of a column
// at once and adds both to a float32: in a panel of the right factor (l, j) and (l + 1, j) lie side by side.

#include <cmath>
#include <vector>

namespace {

using Half = uint16_t;  // the bits of a bfloat16

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)

constexpr int PAIRS = 16;       // in a vector, each of one column
constexpr int COLUMNS = 2 * PAIRS;

struct Panel {  // memory of a thread, at a whole cache line
    std::vector<uint32_t> held;
    uint32_t* of(int64_t size) {
        if (int64_t(held.size()) < size + PAIRS) held.resize(size + PAIRS);
        return reinterpret_cast<uint32_t*>((reinterpret_cast<uintptr_t>(held.data()) + 63) & ~uintptr_t(63));
    }
};

inline uint32_t pair(Half low, Half high) { return low | uint32_t(high) << 16; }
inline uint32_t first(int64_t count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1; }  // as a mask

// rows l and l + 1 of at most COLUMNS numbers, in pairs
inline void zipped(const Half* one, const Half* other, int64_t width, uint32_t* to) {
    using Numbers = Half __attribute__((vector_size(64)));
    const uint32_t some = first(width);
    const auto a = Numbers(_mm512_maskz_loadu_epi16(some, one));
    const auto b = Numbers(other ? _mm512_maskz_loadu_epi16(some, other) : _mm512_setzero_si512());
    _mm512_storeu_si512(to, __m512i(__builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7,
                                                            39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46,
                                                            15, 47)));
    _mm512_storeu_si512(to + PAIRS, __m512i(__builtin_shufflevector(
                                        a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56,
                                        25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63)));
}

// deep x width numbers of b in pairs of rows, `row` pairs to each; what is beyond is 0
inline void pack(Strided<Half> b, int64_t deep, int64_t width, uint32_t* to, int64_t row) {
    const int64_t tall = (deep + 1) / 2;
    if (b.column == 1) {
        for (int64_t l = 0; l < tall; l++)
            for (int64_t j = 0; j < row; j += COLUMNS)
                zipped(b.at(2 * l, j), 2 * l + 1 < deep ? b.at(2 * l + 1, j) : nullptr, width - j, to + l * row + j);
        return;
    }
    const int64_t turned = b.row == 1 ? deep / COLUMNS * PAIRS : 0, done = turned ? width / PAIRS * PAIRS : 0;
    for (int64_t j = 0; j < done; j += PAIRS)
        for (int64_t l = 0; l < turned; l += PAIRS) {
            V32 x[PAIRS];  // pairs are moved, whatever they mean
            for (int k = 0; k < PAIRS; k++) x[k] = _mm512_loadu_ps(b.at(2 * l, j + k));
            turn<float>(x);
            for (int k = 0; k < PAIRS; k++) _mm512_storeu_ps(to + (l + k) * row + j, x[k]);
        }
    for (int64_t l = 0; l < tall; l++) {
        for (int64_t j = l < turned ? done : 0; j < width; j++)
            to[l * row + j] = pair(*b.at(2 * l, j), 2 * l + 1 < deep ? *b.at(2 * l + 1, j) : 0);
        std::fill(to + l * row + width, to + (l + 1) * row, 0u);
    }
}

// so many numbers, as float32
inline V32 widened(const Half* from, int64_t count) {
    return (V32)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), from)), 16);
}

// a tile of TALL rows or fewer; the left factor's rows are `row` numbers apart, its pairs `step`
template <int HEIGHT, int VECTORS>
inline void tile(const Half* a, int64_t row, int64_t step, const uint32_t* b, int64_t deep, const Half* bias, Half* c,
                 int64_t to, int64_t width) {
    V32 sum[HEIGHT][VECTORS];
    for (int v = 0; v < VECTORS; v++) sum[0][v] = bias ? widened(bias + v * PAIRS, width - v * PAIRS) : each(0.0f);
#pragma GCC unroll 14
    for (int i = 1; i < HEIGHT; i++)
        for (int v = 0; v < VECTORS; v++) sum[i][v] = sum[0][v];
    for (int64_t l = 0; l < deep; l++) {
        __m512bh right[VECTORS];
        for (int v = 0; v < VECTORS; v++) right[v] = (__m512bh)_mm512_loadu_si512(b + l * COLUMNS + v * PAIRS);
#pragma GCC unroll 14
        for (int i = 0; i < HEIGHT; i++) {
            int32_t two;
            std::memcpy(&two, a + i * row + l * step, sizeof two);
            const auto left = (__m512bh)_mm512_set1_epi32(two);
            for (int v = 0; v < VECTORS; v++) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], left, right[v]);
        }
    }
#pragma GCC unroll 14
    for (int i = 0; i < HEIGHT; i++)
        for (int v = 0; v < VECTORS; v++)
            _mm256_mask_storeu_epi16(c + i * to + v * PAIRS, first(width - v * PAIRS),
                                     (__m256i)_mm512_cvtneps_pbh(sum[i][v]));
}

using HalfTile = void (*)(const Half*, int64_t, int64_t, const uint32_t*, int64_t, const Half*, Half*, int64_t,
                          int64_t);

template <int VECTORS, int HEIGHT = TALL>
HalfTile half_tile_of(int height) {
    if constexpr (HEIGHT == 1) return tile<1, VECTORS>;
    else return height == HEIGHT ? tile<HEIGHT, VECTORS> : half_tile_of<VECTORS, HEIGHT - 1>(height);
}

// c = bias + a b: rows x n numbers, whose rows are `to` apart; of a bias n, or null
inline void multiply(Strided<Half> a, Strided<Half> b, const Half* bias, Half* c, int64_t to, int64_t rows, int64_t n,
                     int64_t k) {
    thread_local Panel lefts, rights;
    const int64_t deep = (k + 1) / 2, blocks = (rows + TALL - 1) / TALL;
    int64_t step = 2;
    if (a.column != 1 || k % 2) {
        const int64_t wide = (rows + COLUMNS - 1) / COLUMNS * COLUMNS;
        uint32_t* left = lefts.of(deep * wide);
        pack(a.turned(), k, rows, left, wide);
        a = {reinterpret_cast<const Half*>(left), 2, 1};
        step = 2 * wide;
    }
    uint32_t* right = rights.of(deep * COLUMNS);
    for (int64_t j = 0; j < n; j += COLUMNS) {
        const int64_t width = std::min<int64_t>(COLUMNS, n - j);
        pack(b.from(0, j), k, width, right, COLUMNS);
        for (int64_t block = 0, i = 0; block < blocks; block++) {
            const int height = (rows - i) / (blocks - block);
            const HalfTile run = width > PAIRS ? half_tile_of<2>(height) : half_tile_of<1>(height);
            run(a.data + i * a.row, a.row, step, right, deep, bias ? bias + j : nullptr, c + i * to + j, to,
                width);
            i += height;
        }
    }
}

#else

inline float widened(Half x) {
    const uint32_t bits = uint32_t(x) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline Half rounded(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

// the numbers of m x n, along what is dense; they lie as they did
struct Wide {
    std::vector<float> held;
    Strided<float> of(Strided<Half> x, int64_t m, int64_t n) {
        const bool turned = x.row == 1;
        if (turned) std::swap(m, n), x = x.turned();
        if (int64_t(held.size()) < m * n) held.resize(m * n);
        for (int64_t i = 0; i < m; i++) {
            float* to = held.data() + i * n;
            const Half* from = x.at(i, 0);
            if (x.column == 1) for (int64_t j = 0; j < n; j++) to[j] = widened(from[j]);
            else for (int64_t j = 0; j < n; j++) to[j] = widened(from[j * x.column]);
        }
        const Strided<float> made{held.data(), n, 1};
        return turned ? made.turned() : made;
    }
};

// the same, for a processor that does not know such numbers
inline void multiply(Strided<Half> a, Strided<Half> b, const Half* bias, Half* c, int64_t to, int64_t rows, int64_t n,
                     int64_t k) {
    thread_local Wide left, right;
    thread_local std::vector<float> found;
    if (int64_t(found.size()) < rows * n) found.resize(rows * n);
    if (k == 0) std::fill_n(found.data(), rows * n, 0.0f);
    multiply<float>(left.of(a, rows, k), right.of(b, k, n), found.data(), n, rows, n, k);
    for (int64_t i = 0; i < rows; i++) {
        const float* from = found.data() + i * n;
        if (bias) for (int64_t j = 0; j < n; j++) c[i * to + j] = rounded(from[j] + widened(bias[j]));
        else for (int64_t j = 0; j < n; j++) c[i * to + j] = rounded(from[j]);
    }
}

#endif

}  // namespace
