// One product of matrices: tiles of the result stay in registers while their sum is taken
// (Goto, van de Geijn: Anatomy of High-Performance Matrix Multiplication, ACM TOMS 34(3), 2008).

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <immintrin.h>
#include <type_traits>

namespace {

// a vector register: W numbers
#if defined(__AVX512F__)
#define SIMD(name) _mm512_##name
constexpr int TALL = 14;  // rows of a tile: with two vectors of columns it fills the registers
using V32 = __m512;
using V64 = __m512d;
#elif defined(__AVX2__) && defined(__FMA__)
#define SIMD(name) _mm256_##name
constexpr int TALL = 6;
using V32 = __m256;
using V64 = __m256d;
#else
#error "for other processors torch's own kernels serve"
#endif

inline V32 each(float x) { return SIMD(set1_ps)(x); }
inline V64 each(double x) { return SIMD(set1_pd)(x); }
inline V32 load(const float* p) { return SIMD(loadu_ps)(p); }
inline V64 load(const double* p) { return SIMD(loadu_pd)(p); }
inline void store(float* p, V32 x) { SIMD(storeu_ps)(p, x); }
inline void store(double* p, V64 x) { SIMD(storeu_pd)(p, x); }
inline V32 fma(V32 a, V32 b, V32 c) { return SIMD(fmadd_ps)(a, b, c); }
inline V64 fma(V64 a, V64 b, V64 c) { return SIMD(fmadd_pd)(a, b, c); }

template <class T> using Vector = std::conditional_t<sizeof(T) == 4, V32, V64>;
template <class T> constexpr int W = sizeof(Vector<T>) / sizeof(T);
template <class T> constexpr int WIDE = 2 * W<T>;  // columns of a tile
constexpr int64_t DEEP = 256;  // rows of the right factor in a panel: with WIDE columns it stays in the first cache

template <class T>
struct Strided {
    const T* data;
    int64_t row, column;
    const T* at(int64_t i, int64_t j) const { return data + i * row + j * column; }
    Strided from(int64_t i, int64_t j) const { return {at(i, j), row, column}; }
    Strided turned() const { return {data, column, row}; }
};

// the lower and the higher halves of two vectors, number by number in turn
template <int WIDTH, class V>
inline void zip(V a, V b, V& low, V& high) {
    if constexpr (WIDTH == 16) {
        low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        high = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    } else if constexpr (WIDTH == 8) {
        low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
        high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
    } else {
        low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
        high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    }
}

// W x W numbers, turned over: after log2(W) perfect shuffles of its rows
template <class T>
inline void turn(Vector<T> (&x)[W<T>]) {
    constexpr int SIZE = W<T>;
    Vector<T> y[SIZE];
    for (int step = 1; step < SIZE; step *= 2) {
        for (int k = 0; k < SIZE / 2; k++) zip<SIZE>(x[k], x[k + SIZE / 2], y[2 * k], y[2 * k + 1]);
        for (int k = 0; k < SIZE; k++) x[k] = y[k];
    }
}

// deep x width numbers of b, row after row, WIDE to a row; what is beyond the width is 0
template <class T>
void pack(Strided<T> b, int64_t deep, int64_t width, T* to) {
    constexpr int SIZE = W<T>, ROW = WIDE<T>;
    if (b.column == 1) {
        for (int64_t l = 0; l < deep; l++) {
            std::memcpy(to + l * ROW, b.at(l, 0), width * sizeof(T));
            std::fill(to + l * ROW + width, to + (l + 1) * ROW, T(0));
        }
        return;
    }
    const int64_t turned = b.row == 1 && width >= SIZE ? deep / SIZE * SIZE : 0;
    const int64_t done = turned ? width / SIZE * SIZE : 0;
    for (int64_t j = 0; j < done; j += SIZE)
        for (int64_t l = 0; l < turned; l += SIZE) {
            Vector<T> x[SIZE];
            for (int k = 0; k < SIZE; k++) x[k] = load(b.at(l, j + k));
            turn<T>(x);
            for (int k = 0; k < SIZE; k++) store(to + (l + k) * ROW + j, x[k]);
        }
    for (int64_t l = 0; l < deep; l++) {
        for (int64_t j = l < turned ? done : 0; j < width; j++) to[l * ROW + j] = *b.at(l, j);
        std::fill(to + l * ROW + width, to + (l + 1) * ROW, T(0));
    }
}

// a tile of TALL rows or fewer and VECTORS * W columns: c = a b, or c += a b
template <class T, int HEIGHT, int VECTORS>
inline void tile(Strided<T> a, const T* b, int64_t pitch, int64_t deep, T* c, int64_t to, bool more) {
    constexpr int SIZE = W<T>;
    Vector<T> sum[HEIGHT][VECTORS];
    for (int i = 0; i < HEIGHT; i++)
        for (int v = 0; v < VECTORS; v++) sum[i][v] = more ? load(c + i * to + v * SIZE) : each(T(0));
    for (int64_t l = 0; l < deep; l++) {
        Vector<T> row[VECTORS];
        for (int v = 0; v < VECTORS; v++) row[v] = load(b + l * pitch + v * SIZE);
#pragma GCC unroll 14
        for (int i = 0; i < HEIGHT; i++) {
            const Vector<T> x = each(*a.at(i, l));
            for (int v = 0; v < VECTORS; v++) sum[i][v] = fma(x, row[v], sum[i][v]);
        }
    }
    for (int i = 0; i < HEIGHT; i++)
        for (int v = 0; v < VECTORS; v++) store(c + i * to + v * SIZE, sum[i][v]);
}

template <class T> using Tile = void (*)(Strided<T>, const T*, int64_t, int64_t, T*, int64_t, bool);

template <class T, int VECTORS, int HEIGHT = TALL>
Tile<T> tile_of(int height) {
    if constexpr (HEIGHT == 1) return tile<T, 1, VECTORS>;
    else return height == HEIGHT ? tile<T, HEIGHT, VECTORS> : tile_of<T, VECTORS, HEIGHT - 1>(height);
}

inline int64_t parts_of(int64_t whole, int64_t size) { return (whole + size - 1) / size; }

template <class T>
int64_t tiles_of(int64_t rows, int64_t n, int64_t k) {
    return parts_of(k, DEEP) * parts_of(n, WIDE<T>) * parts_of(rows, TALL);
}

struct Nothing {
    void operator()() const {}
};

// c = a b, or c += a b: rows x n numbers, whose rows are `to` apart; `then` is called after each tile
template <class T, class Then = Nothing>
void multiply(Strided<T> a, Strided<T> b, T* c, int64_t to, int64_t rows, int64_t n, int64_t k, bool adds = false,
              Then then = {}) {
    constexpr int SIZE = W<T>, ROW = WIDE<T>;
    alignas(64) T panel[DEEP * ROW], part[TALL * ROW];
    const int64_t blocks = parts_of(rows, TALL);
    for (int64_t l = 0; l < k; l += DEEP) {
        const int64_t deep = std::min(DEEP, k - l);
        const bool more = adds || l > 0;
        for (int64_t j = 0; j < n; j += ROW) {
            const int64_t width = std::min<int64_t>(ROW, n - j);
            const bool whole = width == ROW || width == SIZE, direct = b.column == 1 && width == ROW;
            if (!direct) pack(b.from(l, j), deep, width, panel);
            const T* right = direct ? b.at(l, j) : panel;
            const int64_t pitch = direct ? b.row : ROW;
            for (int64_t block = 0, i = 0; block < blocks; block++) {
                const int height = (rows - i) / (blocks - block);
                const Tile<T> run = width > SIZE ? tile_of<T, 2>(height) : tile_of<T, 1>(height);
                T *own = c + i * to + j, *place = whole ? own : part;
                for (int64_t r = 0; !whole && more && r < height; r++) std::copy_n(own + r * to, width, part + r * ROW);
                run(a.from(i, l), right, pitch, deep, place, whole ? to : ROW, more);
                for (int64_t r = 0; !whole && r < height; r++) std::copy_n(part + r * ROW, width, own + r * to);
                i += height;
                then();
            }
        }
    }
}

}  // namespace

#define CHECKED(call) if (const AOTITorchError error = call) return error
