// Attention, softmax(scale * q k^T) v, and its gradient: a block of rows at a time, whose scores stay in the cache
// (Vaswani et al., 2017; Dao et al., FlashAttention, 2022: the sums of the softmax are kept, and the scores made anew).

#include <cmath>
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
#else
inline V32 rounded(V32 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V32 doubled(V32 x, V32 times) {
    const __m256i power = _mm256_add_epi32(_mm256_cvtps_epi32(times), _mm256_set1_epi32(127));
    return x * _mm256_castsi256_ps(_mm256_slli_epi32(power, 23));
}
inline float sum_of(V32 x) {
    alignas(32) float each[SIZE];
    store(each, x);
    return std::accumulate(each, each + SIZE, 0.f);
}
#endif

// e^x of what is at most about 0, to an ulp or two: 2^n times a polynomial; NaN stays NaN
inline V32 exponential(V32 x) {
    x = most(each(-87.3f), x);
    const V32 n = rounded(x * each(1.44269504f));
    const V32 r = fma(n, each(2.12194440e-4f), fma(n, each(-0.693359375f), x));
    V32 p = each(1.9875691500e-4f);
    for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = fma(p, r, each(c));
    return doubled(fma(p * r, r, r + each(1.f)), n);
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

void softmax(float* row, int64_t count, float scale, float& log_of_sum) {
    V32 high = each(-std::numeric_limits<float>::infinity());
    for (int64_t j = 0; j < count; j += SIZE) high = most(high, load(row + j));
    alignas(64) float each_high[SIZE];
    store(each_high, high);
    const float top = *std::max_element(each_high, each_high + SIZE);
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

void attend(Heads q, Heads k, Heads v, Heads out, Heads sums, bool causal, float scale) {
    const int64_t heads = q.size[0] * q.size[1], rows = q.size[2], width = q.size[3], keys = k.size[2];
    const int64_t blocks = (rows + BLOCK - 1) / BLOCK;
#pragma omp parallel if (heads * blocks > 1)
    {
        const Scores scores(keys);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < heads * blocks; task++) {
            const int64_t head = task / blocks, begin = task % blocks * BLOCK, count = std::min(BLOCK, rows - begin);
            const int64_t seen = seen_by(begin + count - 1, keys, causal);
            multiply(q.of(head).from(begin, 0), k.of(head).turned(), scores.row(0), scores.pitch, count, seen, width);
            for (int64_t i = 0; i < count; i++) {
                const int64_t own = seen_by(begin + i, keys, causal);
                const int64_t whole = scores.fill(i, own, -std::numeric_limits<float>::max());
                softmax(scores.row(i), whole, scale, *sums.at(head, begin + i));
                scores.fill(i, own, 0.f);
            }
            multiply(scores.all(), v.of(head), out.at(head, begin), out.stride[2], count, v.size[3], seen);
        }
    }
}

// dense rows of `width` numbers for one head, put to where they belong
void put(const float* from, Heads to, int64_t head) {
    const int64_t width = to.size[3];
    for (int64_t i = 0; i < to.size[2]; i++)
        for (int64_t d = 0; d < width; d++) to.at(head, i)[d * to.stride[3]] = from[i * width + d];
}

void attend_backward(Heads grad, Heads q, Heads k, Heads v, Heads out, Heads sums, Heads dq, Heads dk, Heads dv,
                     bool causal, float scale) {
    const int64_t heads = q.size[0] * q.size[1], rows = q.size[2], keys = k.size[2];
    const int64_t width = q.size[3], wide = v.size[3];
#pragma omp parallel if (heads > 1)
    {
        const Scores p(keys), ds(keys);
        const std::unique_ptr<float[]> own_q(new float[rows * width]), own_k(new float[keys * width]);
        const std::unique_ptr<float[]> own_v(new float[keys * wide]);
#pragma omp for schedule(static)
        for (int64_t head = 0; head < heads; head++) {
            std::fill_n(own_k.get(), keys * width, 0.f);
            std::fill_n(own_v.get(), keys * wide, 0.f);
            for (int64_t begin = 0; begin < rows; begin += BLOCK) {
                const int64_t count = std::min(BLOCK, rows - begin), seen = seen_by(begin + count - 1, keys, causal);
                const Strided<float> own = q.of(head).from(begin, 0), g = grad.of(head).from(begin, 0);
                multiply(own, k.of(head).turned(), p.row(0), p.pitch, count, seen, width);
                multiply(g, v.of(head).turned(), ds.row(0), ds.pitch, count, seen, wide);
                for (int64_t i = 0; i < count; i++) {
                    const int64_t sees = seen_by(begin + i, keys, causal);
                    const V32 sum = each(*sums.at(head, begin + i)), factor = each(scale);
                    float along = 0;  // the sum of p * dp
                    for (int64_t d = 0; d < wide; d++) along += *g.at(i, d) * out.at(head, begin + i)[d * out.stride[3]];
                    const int64_t whole = p.fill(i, sees, -std::numeric_limits<float>::max());
                    ds.fill(i, sees, 0.f);
                    for (int64_t j = 0; j < whole; j += SIZE) {
                        const V32 part = exponential(fma(load(p.row(i) + j), factor, each(0.f) - sum));
                        store(p.row(i) + j, part);
                        store(ds.row(i) + j, part * (load(ds.row(i) + j) - each(along)) * factor);
                    }
                    p.fill(i, sees, 0.f);
                    ds.fill(i, sees, 0.f);
                }
                multiply(p.all().turned(), g, own_v.get(), wide, seen, wide, count, true);
                multiply(ds.all(), k.of(head), own_q.get() + begin * width, width, count, width, seen);
                multiply(ds.all().turned(), own, own_k.get(), width, seen, width, count, true);
            }
            put(own_q.get(), dq, head);
            put(own_k.get(), dk, head);
            put(own_v.get(), dv, head);
        }
    }
}

}  // namespace

// each tensor: its address, its four sizes and its four strides
extern "C" void memberwise_attention(Heads* t, bool causal, double scale) {
    attend(t[0], t[1], t[2], t[3], t[4], causal, scale);
}

extern "C" void memberwise_attention_backward(Heads* t, bool causal, double scale) {
    attend_backward(t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8], causal, scale);
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

// dense, its dimensions in the order of these strides
AOTITorchError made(const int64_t* sizes, const int64_t* like, int64_t dims, AtenTensorHandle* tensor) {
    int64_t order[4] = {0, 1, 2, 3}, strides[4], step = 1;
    std::stable_sort(order, order + dims, [&](int64_t a, int64_t b) { return like[a] > like[b]; });
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
    const int64_t size[4] = {sizes[0], sizes[1], sizes[2], 1};
    const int64_t stride[4] = {t[4].stride[0], t[4].stride[1], t[4].stride[2], 1};
    t[4] = {t[4].data, size, stride};
    memberwise_attention(t, causal, scale);
    return AOTI_TORCH_SUCCESS;
}

extern "C" AOTITorchError aoti_torch_cpu_attention_backward(
    AtenTensorHandle grad, AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle out,
    AtenTensorHandle sums, int32_t causal, double scale, AtenTensorHandle* dq, AtenTensorHandle* dk,
    AtenTensorHandle* dv) {
    Heads t[9];
    const AtenTensorHandle given[6] = {grad, q, k, v, out, sums};
    for (int i = 0; i < 6; i++) CHECKED(heads_of(given[i], t[i]));
    AtenTensorHandle* results[3] = {dq, dk, dv};
    for (int i = 0; i < 3; i++) {
        CHECKED(made(t[i + 1].size, t[i + 1].stride, 4, results[i]));
        CHECKED(heads_of(*results[i], t[i + 6]));
    }
    const int64_t size[4] = {t[5].size[0], t[5].size[1], t[5].size[2], 1};
    const int64_t stride[4] = {t[5].stride[0], t[5].stride[1], t[5].stride[2], 1};
    t[5] = {t[5].data, size, stride};
    memberwise_attention_backward(t, causal, scale);
    return AOTI_TORCH_SUCCESS;
}
