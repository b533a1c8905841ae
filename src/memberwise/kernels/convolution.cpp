// Convolutions of 3 x 3 taps, one or two apart, and their gradients: 16 or 25 products for each tile of 2 x 2 results
// (`tiles.h`), not 36. Where a number is not finite, the other results of its tile would not be either: then there is
// no answer, and torch's kernel serves.

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int64_t BLOCK = 64;  // tiles at a time, whose points stay in the second cache
constexpr int64_t MANY = 512;  // channels whose weights are so many that to read them less often is worth more
constexpr int64_t PANELS = 2;  // of results' points at a time, which stay there as well
constexpr int64_t DEEP_TAPS = 128;  // rows of weights at a time, if they become points on the way

int threads() {
#ifdef _OPENMP
    return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
    return 1;
#endif
}

// memory of a thread's own, which stays for the next call
struct Scratch {
    std::unique_ptr<float[]> held;
    int64_t size = 0;
    float* of(int64_t numbers) {
        if (numbers > size) held.reset(new float[(size = numbers) + LINE]);
        return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(held.get()) + 63) / 64 * 64);
    }
};

// of a thread; of all
thread_local Scratch own, common;

// all weights of a group as points, panel by panel: made before, as several blocks read them
template <class S>
struct Weights {
    const Taps& taps;
    const int64_t lanes, rows, panels;
    float* const points;
    static int64_t all(int64_t panels, int64_t rows) { return Points::apart(panels * rows * PANEL); }
    void make(int64_t lane) const {
        weights_of<S>(taps, lane, int(least(LANES, lanes - lane)), 0, rows,
                      points + lane / PANEL * rows * PANEL + lane % PANEL, all(panels, rows));
    }
    void multiply_by(const Points& v, int64_t count, int64_t first, int64_t last, const Points& m) const {
        for (int k = 0; k < PRODUCTS<S>; k++)
            for (int64_t panel = first; panel < last; panel++)
                multiply<float>({v.at(k, 0, 0), v.pitch, 1},
                                {points + weight_of<S>(k) * all(panels, rows) + panel * rows * PANEL, PANEL, 1},
                                m.at(k, 0, (panel - first) * PANEL), m.pitch, count, PANEL, rows);
    }
    // a single block makes them on the way, a few rows at a time
    void multiply_once(const Points& v, int64_t count, int64_t first, int64_t last, const Points& m,
                       float* some) const {
        const int64_t size = all(1, DEEP_TAPS);
        for (int64_t panel = first; panel < last; panel++)
            for (int64_t row = 0; row < rows; row += DEEP_TAPS) {
                const int64_t deep = least(DEEP_TAPS, rows - row), end = least((panel + 1) * PANEL, lanes);
                for (int64_t lane = panel * PANEL; lane < end; lane += LANES)
                    weights_of<S>(taps, lane, int(least(LANES, lanes - lane)), row, deep, some + lane % PANEL, size);
                for (int k = 0; k < PRODUCTS<S>; k++)
                    multiply<float>({v.at(k, 0, row), v.pitch, 1}, {some + weight_of<S>(k) * size, PANEL, 1},
                                    m.at(k, 0, (panel - first) * PANEL), m.pitch, count, PANEL, deep, row > 0);
            }
    }
};

// out = in convolved with the taps, of one group; whether all of it is finite
template <class S>
bool convolve(const Images& in, const Images& out, int64_t images, const Taps& taps, Edges around, Edges before) {
    const Blocks<S> blocks(out, images, around, before, in.channels < MANY ? BLOCK : 2 * BLOCK);
    const int64_t panels = (out.channels + PANEL - 1) / PANEL;
    const bool once = blocks.count == 1;
    const int64_t parts = once ? least(panels, threads()) : 1, tasks = blocks.count * parts;
    const Weights<S> weights{taps, out.channels, in.channels, panels,
                             once ? nullptr : common.of(WEIGHTS * Weights<S>::all(panels, in.channels))};
    bool right = true;
#pragma omp parallel reduction(&& : right) num_threads(threads())
    {
        V32 check = each(0.f);
        if (!once) {
#pragma omp for schedule(static)
            for (int64_t lane = 0; lane < out.channels; lane += LANES) weights.make(lane);
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t block = task / parts, part = task % parts, count = blocks.size(block);
            const int64_t first = panels * part / parts, last = panels * (part + 1) / parts;
            const int64_t deep = whole(in.channels, LANES) + LINE, wide = least(PANELS, last - first) * PANEL + LINE;
            const int64_t size = PRODUCTS<S> * (Points::apart(blocks.most * deep) + Points::apart(blocks.most * wide));
            const Points v(own.of(size + blocks.strip() + WEIGHTS * Weights<S>::all(1, DEEP_TAPS)), blocks.most, deep);
            const Points m(v.end(PRODUCTS<S>), blocks.most, wide);
            float* const strip = m.end(PRODUCTS<S>);
            blocks.numbers(in, block, strip, v);
            for (int64_t panel = first; panel < last; panel += PANELS) {
                const int64_t end = least(panel + PANELS, last);
                if (once) weights.multiply_once(v, count, panel, end, m, strip + blocks.strip());
                else weights.multiply_by(v, count, panel, end, m);
                blocks.results(m, panel * PANEL, least(end * PANEL, out.channels), block, strip, out, check);
            }
        }
        right = finite(check);
    }
    return right;
}

// the taps' gradient, (out, in, 9), of the results' channels [first, last) of one group; whether all of it is finite
template <class S>
bool weigh(const Images& in, const Images& grad, const Blocks<S>& blocks, int64_t first, int64_t last, float* taps) {
    const int64_t deep = whole(in.channels, LANES), high = last - first;
    const int64_t step = blocks.count == 1 ? least(high, PANEL) : high;  // rows of the sums that are kept
    const int64_t v_pitch = deep + LINE, z_pitch = whole(high, LANES) + LINE;
    const int64_t size = Points::apart(step * deep);
    const int64_t points = Points::apart(blocks.most * v_pitch) + Points::apart(blocks.most * z_pitch);
    const Points v(own.of(PRODUCTS<S> * points + WEIGHTS * size + blocks.strip()), blocks.most, v_pitch);
    const Points z(v.end(PRODUCTS<S>), blocks.most, z_pitch);
    float *const sums = z.end(PRODUCTS<S>), *const strip = sums + WEIGHTS * size;
    V32 check = each(0.f);
    for (int64_t block = 0; block < blocks.count; block++) {
        blocks.numbers(in, block, strip, v);
        blocks.gradients(grad, first, last, block, strip, z);
        for (int64_t row = 0; row < high; row += step) {
            const int64_t rows = least(step, high - row);
            bool begun[WEIGHTS] = {};
            for (int k = 0; k < PRODUCTS<S>; k++) {
                const int to = weight_of<S>(k);
                multiply<float>({z.at(k, 0, row), 1, z_pitch}, {v.at(k, 0, 0), v_pitch, 1}, sums + to * size, deep,
                                rows, deep, blocks.size(block), block > 0 || begun[to]);
                begun[to] = true;
            }
            for (int64_t r = 0; block + 1 == blocks.count && r < rows; r++)
                for (int64_t lane = 0; lane < in.channels; lane += LANES)
                    taps_of<S>(sums + r * deep + lane, size, taps + ((first + row + r) * in.channels + lane) * TAPS,
                               int(least(LANES, in.channels - lane)), check);
        }
    }
    return finite(check);
}

template <class S>
bool weigh(const Images& in, const Images& grad, int64_t images, float* taps, Edges padding) {
    const Blocks<S> blocks(grad, images, padding, {0, 0}, 2 * BLOCK);
    const int64_t lines = (grad.channels + LANES - 1) / LANES, parts = least(threads(), lines);
    bool right = true;
#pragma omp parallel for schedule(static) reduction(&& : right) num_threads(threads()) if (parts > 1)
    for (int64_t part = 0; part < parts; part++) {
        const int64_t first = lines * part / parts * LANES, last = lines * (part + 1) / parts * LANES;
        right = right && weigh(in, grad, blocks, first, least(last, grad.channels), taps);
    }
    return right;
}

struct Sizes {
    int64_t images, groups, in, out, height, width, stride, top, left;  // channels of a group; padding
    int64_t high() const { return (height + 2 * top - 3) / stride + 1; }
    int64_t wide() const { return (width + 2 * left - 3) / stride + 1; }
    Images inputs(float* x, int64_t g) const {
        return {x + g * in * height * width, groups * in, in, height, width};
    }
    Images results(float* y, int64_t g) const {
        return {y + g * out * high() * wide(), groups * out, out, high(), wide()};
    }
};

template <class S>
bool forward(float* out, float* x, float* w, const Sizes& z) {
    bool right = true;
    for (int64_t g = 0; g < z.groups && right; g++)
        right = convolve<S>(z.inputs(x, g), z.results(out, g), z.images,
                            {w + g * z.out * z.in * TAPS, z.in * TAPS, TAPS, false}, {z.top, z.left}, {0, 0});
    return right;
}

template <class S>
bool backward(float* to_x, float* to_w, float* grad, float* x, float* w, const Sizes& z) {
    const Edges around{S::around(z.top), S::around(z.left)}, before{S::before(z.top), S::before(z.left)};
    bool right = true;
    for (int64_t g = 0; g < z.groups && right; g++) {
        const int64_t weights = g * z.out * z.in * TAPS;
        const Images given = z.results(grad, g);
        right = convolve<typename S::Back>(given, z.inputs(to_x, g), z.images,
                                           {w + weights, TAPS, z.in * TAPS, true}, around, before) &&
                weigh<S>(z.inputs(x, g), given, z.images, to_w + weights, {z.top, z.left});
    }
    return right;
}

}  // namespace

// the results, or false
extern "C" bool memberwise_convolution(float* out, float* x, float* w, Sizes z) {
    return z.stride == 1 ? forward<One>(out, x, w, z) : forward<Two>(out, x, w, z);
}

extern "C" bool memberwise_convolution_backward(float* to_x, float* to_w, float* grad, float* x, float* w, Sizes z) {
    return z.stride == 1 ? backward<One>(to_x, to_w, grad, x, w, z) : backward<Two>(to_x, to_w, grad, x, w, z);
}

namespace {

// sizes of contiguous x and w, as numbers of a group
AOTITorchError sizes_of(AtenTensorHandle x, AtenTensorHandle w, int64_t stride, int64_t top, int64_t left,
                        int64_t groups, Sizes& z) {
    int64_t *a, *b;
    CHECKED(aoti_torch_get_sizes(x, &a));
    CHECKED(aoti_torch_get_sizes(w, &b));
    z = {a[0], groups, b[1], b[0] / groups, a[2], a[3], stride, top, left};
    return AOTI_TORCH_SUCCESS;
}

AOTITorchError data_of(AtenTensorHandle tensor, float*& data) {
    void* at;
    CHECKED(aoti_torch_get_data_ptr(tensor, &at));
    data = static_cast<float*>(at);
    return AOTI_TORCH_SUCCESS;
}

AOTITorchError made(int64_t a, int64_t b, int64_t c, int64_t d, AtenTensorHandle* tensor, float*& data) {
    const int64_t sizes[4] = {a, b, c, d}, strides[4] = {b * c * d, c * d, d, 1};
    CHECKED(aoti_torch_empty_strided(4, sizes, strides, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0,
                                     tensor));
    return data_of(*tensor, data);
}

constexpr int64_t ONE[2] = {1, 1}, NONE[2] = {0, 0};

}  // namespace

extern "C" AOTITorchError aoti_torch_cpu_convolution3x3(AtenTensorHandle x, AtenTensorHandle w, int64_t stride,
                                                        int64_t top, int64_t left, int64_t groups,
                                                        AtenTensorHandle* out) {
    Sizes z;
    float *from, *weights, *to;
    CHECKED(sizes_of(x, w, stride, top, left, groups, z));
    CHECKED(data_of(x, from));
    CHECKED(data_of(w, weights));
    CHECKED(made(z.images, groups * z.out, z.high(), z.wide(), out, to));
    if (memberwise_convolution(to, from, weights, z)) return AOTI_TORCH_SUCCESS;
    CHECKED(aoti_torch_delete_tensor_object(*out));
    const int64_t apart[2] = {stride, stride}, padding[2] = {top, left};
    return aoti_torch_cpu_convolution(x, w, nullptr, apart, 2, padding, 2, ONE, 2, 0, NONE, 2, groups, out);
}

extern "C" AOTITorchError aoti_torch_cpu_convolution3x3_backward(AtenTensorHandle grad, AtenTensorHandle x,
                                                                 AtenTensorHandle w, int64_t stride, int64_t top,
                                                                 int64_t left, int64_t groups, AtenTensorHandle* to_x,
                                                                 AtenTensorHandle* to_w) {
    Sizes z;
    float *given, *from, *weights, *dx, *dw;
    CHECKED(sizes_of(x, w, stride, top, left, groups, z));
    CHECKED(data_of(grad, given));
    CHECKED(data_of(x, from));
    CHECKED(data_of(w, weights));
    CHECKED(made(z.images, groups * z.in, z.height, z.width, to_x, dx));
    CHECKED(made(groups * z.out, z.in, 3, 3, to_w, dw));
    if (memberwise_convolution_backward(dx, dw, given, from, weights, z)) return AOTI_TORCH_SUCCESS;
    CHECKED(aoti_torch_delete_tensor_object(*to_x));
    CHECKED(aoti_torch_delete_tensor_object(*to_w));
    const int64_t apart[2] = {stride, stride}, padding[2] = {top, left};
    const int32_t wanted[3] = {1, 1, 0};
    AtenTensorHandle bias;
    return aoti_torch_cpu_convolution_backward(grad, x, w, nullptr, 0, apart, 2, padding, 2, ONE, 2, 0, NONE, 2, groups,
                                               wanted, 3, to_x, to_w, &bias);
}
