// Attention, softmax(scale * q k^T) v, and its gradient: a block of rows at a time, whose scores stay in the cache
// (Vaswani et al., 2017; Dao et al., FlashAttention, 2022: the sums of the softmax are kept, and the scores made anew).
// With dropout the softmax is multiplied by what was drawn.

#include <cmath>
#include <initializer_list>
#include <limits>
#include <memory>
#include <numeric>

namespace {

constexpr int64_t BLOCK = 64;  // rows of the scores
constexpr int SIZE = W<float>;

inline V32 most(V32 a, V32 b) { return SIMD(max_ps)(a, b); }
#if defined(__AVX512F__)
inline V32 rounded(V32 x) { return _mm512_roundscale_ps(x, 0); }
inline V32 doubled(V32 x, V32 times) { return _mm512_scalef_ps(x, times); }
inline float sum_of(V32 x) { return _mm512_reduce_add_ps(x); }
inline V32 unless_below(V32 x, V32 low, V32 y) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, low, _CMP_NLT_UQ), y);
}
#else
inline V32 rounded(V32 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V32 doubled(V32 x, V32 times) {
    const __m256i power = _mm256_add_epi32(_mm256_cvtps_epi32(times), _mm256_set1_epi32(127));
    return x * _mm256_castsi256_ps(_mm256_slli_epi32(power, 23));
}
inline V32 unless_below(V32 x, V32 low, V32 y) { return _mm256_and_ps(_mm256_cmp_ps(x, low, _CMP_NLT_UQ), y); }
inline float sum_of(V32 x) {
    alignas(32) float each[SIZE];
    store(each, x);
    return std::accumulate(each, each + SIZE, 0.f);
}
#endif

// e^x of what is at most about 0, to an ulp or two: 2^n times a polynomial; NaN stays NaN, what has no exponent is 0
inline V32 exponential(V32 given) {
    const V32 low = each(-87.3f), x = most(low, given);
    const V32 n = rounded(x * each(1.44269504f));
    const V32 r = fma(n, each(2.12194440e-4f), fma(n, each(-0.693359375f), x));
    V32 p = each(1.9875691500e-4f);
    for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = fma(p, r, each(c));
    return unless_below(given, low, doubled(fma(p * r, r, r + each(1.f)), n));
}

struct Heads {  // (batch, heads, rows, width)
    float* data;
    const int64_t *size, *stride;
    Strided<float> of(int64_t head) const {
        return {data + head / size[1] * stride[0] + head % size[1] * stride[1], stride[2], stride[3]};
    }
    float* at(int64_t head, int64_t row) const { return const_cast<float*>(of(head).at(row, 0)); }
};

struct Scores {  // of BLOCK rows, each filled up to whole vectors with what counts for nothing
    int64_t pitch;
    std::unique_ptr<float[]> memory;
    explicit Scores(int64_t keys) : pitch((keys + SIZE - 1) / SIZE * SIZE), memory(new float[BLOCK * pitch]) {}
    float* row(int64_t i) const { return memory.get() + i * pitch; }
    Strided<float> all() const { return {memory.get(), pitch, 1}; }
    int64_t fill(int64_t i, int64_t seen, float value) const {
        std::fill(row(i) + seen, row(i) + pitch, value);
        return (seen + SIZE - 1) / SIZE * SIZE;
    }
};

// how many keys a row sees
inline int64_t seen_by(int64_t row, int64_t keys, bool causal) { return causal ? std::min(keys, row + 1) : keys; }

// what the softmax is multiplied by, times `factor`, (batch, heads, rows, keys); or nothing
struct Dropout {
    const Heads* drawn;
    float factor;
    operator bool() const { return drawn != nullptr; }
    void multiply(int64_t head, int64_t i, int64_t keys, float* row) const {
        const float* from = drawn->at(head, i);
        const int64_t apart = drawn->stride[3];
        if (apart == 1)  // which a compiler makes vectors of
            for (int64_t j = 0; j < keys; j++) row[j] *= from[j] * factor;
        else
            for (int64_t j = 0; j < keys; j++) row[j] *= from[j * apart] * factor;
    }
};

bool finite(Strided<float> x, int64_t rows, int64_t columns) {
    if (x.row < x.column) std::swap(x.row, x.column), std::swap(rows, columns);
    const int64_t whole = x.column == 1 ? columns / SIZE * SIZE : 0;
    V32 zeros = each(0.f);  // or NaN
    float others = 0;
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < whole; j += SIZE) zeros = fma(load(x.at(i, j)), each(0.f), zeros);
        for (int64_t j = whole; j < columns; j++) others += *x.at(i, j) * 0.f;
    }
    return sum_of(zeros) + others == 0;
}

bool finite(std::initializer_list<Heads> all, int64_t head) {
    return std::all_of(all.begin(), all.end(), [&](Heads x) { return finite(x.of(head), x.size[2], x.size[3]); });
}

// Which keys a row sees. Single operations multiply what it does not see by 0, and 0 times what is not finite is NaN:
// then all of them are looked at (`whole`), as single operations do.
struct Sight {
    int64_t keys;
    bool causal, whole;
    int64_t block(int64_t last) const { return whole ? keys : seen_by(last, keys, causal); }
    int64_t row(int64_t row) const { return seen_by(row, keys, causal); }
    // hides the other keys from row i of the block, row `row` of all; how many numbers to look at, whole vectors
    int64_t hide(const Scores& scores, int64_t i, int64_t row) const {
        const int64_t own = this->row(row);
        if (!whole) return scores.fill(i, own, -std::numeric_limits<float>::max());
        for (int64_t j = own; j < keys; j++) scores.row(i)[j] -= std::numeric_limits<float>::infinity();
        return scores.fill(i, keys, -std::numeric_limits<float>::infinity());
    }
    void clear(const Scores& scores, int64_t i, int64_t row) const { scores.fill(i, whole ? keys : this->row(row), 0.f); }
};

// of nothing but -inf it is 0 if `safe`, and so is each score's share of the sum that is then told
void softmax(float* row, int64_t count, float scale, float& log_of_sum, bool safe) {
    V32 high = each(-std::numeric_limits<float>::infinity());
    for (int64_t j = 0; j < count; j += SIZE) high = most(high, load(row + j));
    alignas(64) float each_high[SIZE];
    store(each_high, high);
    const float top = *std::max_element(each_high, each_high + SIZE);
    const bool none = top == -std::numeric_limits<float>::infinity();  // or NaN, which `most` may leave out
    if (safe && none && std::none_of(row, row + count, [](float x) { return x != x; })) {
        std::fill_n(row, count, 0.f);
        log_of_sum = -top;
        return;
    }
    V32 sum = each(0.f);
    for (int64_t j = 0; j < count; j += SIZE) {
        const V32 p = exponential((load(row + j) - each(top)) * each(scale));
        store(row + j, p);
        sum = sum + p;
    }
    const float all = sum_of(sum);
    for (int64_t j = 0; j < count; j += SIZE) store(row + j, load(row + j) * each(1 / all));
    log_of_sum = top * scale + std::log(all);
}

void attend(Heads q, Heads k, Heads v, Heads out, Heads sums, bool causal, float scale, Dropout dropout = {}) {
    const int64_t heads = q.size[0] * q.size[1], rows = q.size[2], width = q.size[3], keys = k.size[2];
    const int64_t blocks = (rows + BLOCK - 1) / BLOCK;
#pragma omp parallel if (heads * blocks > 1)
    {
        const Scores scores(keys);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < heads * blocks; task++) {
            const int64_t head = task / blocks, begin = task % blocks * BLOCK, count = std::min(BLOCK, rows - begin);
            const Sight sight{keys, causal, dropout && !finite({q, k, v}, head)};
            const int64_t seen = sight.block(begin + count - 1);
            multiply(q.of(head).from(begin, 0), k.of(head).turned(), scores.row(0), scores.pitch, count, seen, width);
            for (int64_t i = 0; i < count; i++) {
                const int64_t numbers = sight.hide(scores, i, begin + i);
                softmax(scores.row(i), numbers, scale, *sums.at(head, begin + i), dropout);
                sight.clear(scores, i, begin + i);
                if (dropout) dropout.multiply(head, begin + i, seen, scores.row(i));
            }
            multiply(scores.all(), v.of(head), out.at(head, begin), out.stride[2], count, v.size[3], seen);
        }
    }
}

// c += a b, of which c lies by rows or by columns
void add_product(Strided<float> a, Strided<float> b, Strided<float> c, int64_t rows, int64_t n, int64_t k) {
    if (c.column != 1) std::swap(a, b), a = a.turned(), b = b.turned(), c = c.turned(), std::swap(rows, n);
    multiply(a, b, const_cast<float*>(c.data), c.row, rows, n, k, true);
}

void clear(Heads x, int64_t head) {
    const Strided<float> all = x.of(head);
    for (int64_t i = 0; i < x.size[2]; i++)
        for (int64_t d = 0; d < x.size[3]; d++) const_cast<float&>(*all.at(i, d)) = 0;
}

// the gradients lie by rows or by columns, each head for itself
void attend_backward(Heads grad, Heads q, Heads k, Heads v, Heads sums, Heads dq, Heads dk, Heads dv, bool causal,
                     float scale, Dropout dropout = {}) {
    const int64_t heads = q.size[0] * q.size[1], rows = q.size[2], keys = k.size[2];
    const int64_t width = q.size[3], wide = v.size[3];
    const V32 factor = each(scale);
#pragma omp parallel if (heads > 1)
    {
        const Scores p(keys), ds(keys);
#pragma omp for schedule(static)
        for (int64_t head = 0; head < heads; head++) {
            const Sight sight{keys, causal, dropout && !finite({grad, q, k, v}, head)};
            for (Heads x : {dq, dk, dv}) clear(x, head);
            for (int64_t begin = 0; begin < rows; begin += BLOCK) {
                const int64_t count = std::min(BLOCK, rows - begin), seen = sight.block(begin + count - 1);
                const Strided<float> own = q.of(head).from(begin, 0), g = grad.of(head).from(begin, 0);
                multiply(own, k.of(head).turned(), p.row(0), p.pitch, count, seen, width);
                multiply(g, v.of(head).turned(), ds.row(0), ds.pitch, count, seen, wide);
                for (int64_t i = 0; i < count; i++) {
                    const V32 sum = each(*sums.at(head, begin + i));
                    V32 products = each(0.f);
                    const int64_t numbers = sight.hide(p, i, begin + i);
                    if (dropout) dropout.multiply(head, begin + i, seen, ds.row(i));
                    ds.fill(i, seen, 0.f);
                    for (int64_t j = 0; j < numbers; j += SIZE) {
                        const V32 part = exponential(fma(load(p.row(i) + j), factor, each(0.f) - sum));
                        store(p.row(i) + j, part);
                        products = fma(part, load(ds.row(i) + j), products);
                    }
                    const V32 along = each(sum_of(products));
                    for (int64_t j = 0; j < numbers; j += SIZE)
                        store(ds.row(i) + j, load(p.row(i) + j) * (load(ds.row(i) + j) - along) * factor);
                    sight.clear(p, i, begin + i);
                    sight.clear(ds, i, begin + i);
                    if (dropout) dropout.multiply(head, begin + i, seen, p.row(i));
                }
                add_product(p.all().turned(), g, dv.of(head), seen, wide, count);
                add_product(ds.all(), k.of(head), dq.of(head).from(begin, 0), count, width, seen);
                add_product(ds.all().turned(), own, dk.of(head), seen, width, count);
            }
        }
    }
}

// a tensor's memory in other sizes and strides
struct Relaid {
    const int64_t size[4], stride[4];
    float* const data;
    operator Heads() const { return {data, size, stride}; }
};

// keys that lie turned, (batch, heads, width, keys), as (batch, heads, keys, width)
Relaid turned(Heads k) {
    return {{k.size[0], k.size[1], k.size[3], k.size[2]}, {k.stride[0], k.stride[1], k.stride[3], k.stride[2]}, k.data};
}

// a number for each row, (batch, heads, rows), as a column
Relaid column(Heads x) {
    return {{x.size[0], x.size[1], x.size[2], 1}, {x.stride[0], x.stride[1], x.stride[2], 1}, x.data};
}

}  // namespace

// each tensor: its address, its four sizes and its four strides
extern "C" void memberwise_attention(Heads* t, bool causal, double scale) {
    attend(t[0], t[1], t[2], t[3], t[4], causal, scale);
}

extern "C" void memberwise_attention_backward(Heads* t, bool causal, double scale) {
    attend_backward(t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], causal, scale);
}

extern "C" void memberwise_attention_dropout(Heads* t, bool causal, double factor) {
    attend(t[0], turned(t[1]), t[2], t[4], t[5], causal, 1, {&t[3], float(factor)});
}

extern "C" void memberwise_attention_dropout_backward(Heads* t, bool causal, double factor) {
    attend_backward(t[0], t[1], turned(t[2]), t[3], t[5], t[6], turned(t[7]), t[8], causal, 1,
                    {&t[4], float(factor)});
}

namespace {

AOTITorchError heads_of(AtenTensorHandle tensor, Heads& heads) {
    void* data;
    int64_t *sizes, *strides;
    CHECKED(aoti_torch_get_data_ptr(tensor, &data));
    CHECKED(aoti_torch_get_sizes(tensor, &sizes));
    CHECKED(aoti_torch_get_strides(tensor, &strides));
    heads = {static_cast<float*>(data), sizes, strides};
    return AOTI_TORCH_SUCCESS;
}

// dense, its dimensions in the order of these strides, if each head then lies by rows or by columns
AOTITorchError made(const int64_t* sizes, const int64_t* like, int64_t dims, AtenTensorHandle* tensor) {
    int64_t order[4] = {0, 1, 2, 3}, strides[4], step = 1;
    std::stable_sort(order, order + dims, [&](int64_t a, int64_t b) { return like[a] > like[b]; });
    if (order[dims - 1] < dims - 2) std::iota(order, order + dims, 0);
    for (int64_t k = dims - 1; k >= 0; k--) strides[order[k]] = step, step *= sizes[order[k]];
    return aoti_torch_empty_strided(dims, sizes, strides, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0,
                                    tensor);
}

}  // namespace

extern "C" AOTITorchError aoti_torch_cpu_attention(AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v,
                                                   int32_t causal, double scale, AtenTensorHandle* out,
                                                   AtenTensorHandle* sums) {
    Heads t[5];
    CHECKED(heads_of(q, t[0]));
    CHECKED(heads_of(k, t[1]));
    CHECKED(heads_of(v, t[2]));
    const int64_t by_rows[4] = {4, 2, 3, 1}, sizes[4] = {t[0].size[0], t[0].size[1], t[0].size[2], t[2].size[3]};
    CHECKED(made(sizes, by_rows, 4, out));
    CHECKED(made(sizes, by_rows, 3, sums));
    CHECKED(heads_of(*out, t[3]));
    CHECKED(heads_of(*sums, t[4]));
    const Relaid by_row = column(t[4]);
    t[4] = by_row;
    memberwise_attention(t, causal, scale);
    return AOTI_TORCH_SUCCESS;
}

extern "C" AOTITorchError aoti_torch_cpu_attention_backward(
    AtenTensorHandle grad, AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle sums,
    int32_t causal, double scale, AtenTensorHandle* dq, AtenTensorHandle* dk, AtenTensorHandle* dv) {
    Heads t[8];
    const AtenTensorHandle given[5] = {grad, q, k, v, sums};
    for (int i = 0; i < 5; i++) CHECKED(heads_of(given[i], t[i]));
    AtenTensorHandle* results[3] = {dq, dk, dv};
    for (int i = 0; i < 3; i++) {
        CHECKED(made(t[i + 1].size, t[i + 1].stride, 4, results[i]));
        CHECKED(heads_of(*results[i], t[i + 5]));
    }
    const Relaid by_row = column(t[4]);
    t[4] = by_row;
    memberwise_attention_backward(t, causal, scale);
    return AOTI_TORCH_SUCCESS;
}

namespace {

// `count` results of four dimensions, without gaps
AOTITorchError made(const int64_t (*sizes)[4], int count, AtenTensorHandle** results, Heads* heads) {
    for (int k = 0; k < count; k++) {
        const int64_t by_size[4] = {3, 2, 1, 0};
        CHECKED(made(sizes[k], by_size, 4, results[k]));
        CHECKED(heads_of(*results[k], heads[k]));
    }
    return AOTI_TORCH_SUCCESS;
}

}  // namespace

extern "C" AOTITorchError aoti_torch_cpu_attention_dropout(AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v,
                                                           AtenTensorHandle drawn, double factor, int32_t causal,
                                                           AtenTensorHandle* out, AtenTensorHandle* sums) {
    Heads t[6];
    const AtenTensorHandle given[4] = {q, k, v, drawn};
    for (int i = 0; i < 4; i++) CHECKED(heads_of(given[i], t[i]));
    const int64_t* rows = t[0].size;
    const int64_t sizes[2][4] = {{rows[0], rows[1], rows[2], t[2].size[3]}, {rows[0], rows[1], rows[2], 1}};
    AtenTensorHandle* results[2] = {out, sums};
    CHECKED(made(sizes, 2, results, t + 4));
    memberwise_attention_dropout(t, causal, factor);
    return AOTI_TORCH_SUCCESS;
}

extern "C" AOTITorchError aoti_torch_cpu_attention_dropout_backward(
    AtenTensorHandle grad, AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle drawn,
    AtenTensorHandle sums, double factor, int32_t causal, AtenTensorHandle* dq, AtenTensorHandle* dk,
    AtenTensorHandle* dv) {
    Heads t[9];
    const AtenTensorHandle given[6] = {grad, q, k, v, drawn, sums};
    for (int i = 0; i < 6; i++) CHECKED(heads_of(given[i], t[i]));
    int64_t sizes[3][4];
    for (int i = 0; i < 3; i++) std::copy_n(t[i + 1].size, 4, sizes[i]);
    AtenTensorHandle* results[3] = {dq, dk, dv};
    CHECKED(made(sizes, 3, results, t + 6));
    memberwise_attention_dropout_backward(t, causal, factor);
    return AOTI_TORCH_SUCCESS;
}
