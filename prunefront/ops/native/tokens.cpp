// Merging tokens on a CPU: what torch needs a dozen small operators for, each of which costs more than the arithmetic of
// a whole merge at batch 1. `prunefront/ops/merge.py` says what is computed, and why.
//
// Built by whatever compiler is there in two seconds, without torch's headers. Row-major, float32 or bfloat16 tokens,
// float32 sizes; sums are in float32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

// The part of torch's stable C interface that is needed here; torch/csrc/inductor/aoti_torch/c/shim.h says what is
// promised of it. Arguments and results of an operator are on one stack: numbers as they are, tensors as handles that
// the operator owns, what may be None as null or as the address of a value on the heap.
extern "C" {
using AtenTensorHandle = struct AtenTensorOpaque*;
using TorchLibraryHandle = struct TorchLibraryOpaque*;
using StableIValue = uint64_t;

int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** data);
int32_t aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* dtype);
int32_t aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t** sizes);
int32_t aoti_torch_get_strides(AtenTensorHandle tensor, int64_t** strides);
int32_t aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                 int32_t device_type, int32_t device_index, AtenTensorHandle* made);
int32_t aoti_torch_copy_(AtenTensorHandle to, AtenTensorHandle from, int32_t non_blocking);
int32_t aoti_torch_delete_tensor_object(AtenTensorHandle tensor);
int32_t aoti_torch_library_init_impl(const char* name, const char* dispatch_key, const char* file, uint32_t line,
                                     TorchLibraryHandle* made);
int32_t aoti_torch_library_impl(TorchLibraryHandle library, const char* name,
                                void (*function)(StableIValue*, uint64_t, uint64_t));
}

namespace {

constexpr int64_t kColumns = 64;  // Of a tile of similarities: as many sums as fit into registers.
constexpr int64_t kRows = 4;

struct BFloat16 {
    uint16_t bits;
};

inline float as_float(float x) { return x; }

inline float as_float(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void store(float value, float& to) { to = value; }

// To the nearest, ties to even; not-a-numbers stay such.
inline void store(float value, BFloat16& to) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to.bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

// Sixteen numbers, which GCC and Clang keep in one, two or four registers.
constexpr int64_t kLanes = 16;
using Vector = float __attribute__((vector_size(kLanes * sizeof(float)), may_alias));

inline Vector load(const float* from) {
    Vector values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

inline Vector load(const BFloat16* from) {
    using Short = uint16_t __attribute__((vector_size(kLanes * sizeof(uint16_t))));
    using Long = uint32_t __attribute__((vector_size(kLanes * sizeof(uint32_t))));
    Short bits;
    std::memcpy(&bits, from, sizeof bits);
    const Long shifted = __builtin_convertvector(bits, Long) << 16;
    Vector values;
    std::memcpy(&values, &shifted, sizeof values);
    return values;
}

inline float sum_of(const Vector& values) {
    float total = 0.0f;
    for (int64_t lane = 0; lane < kLanes; ++lane) total += values[lane];
    return total;
}

template <typename T>
float dot(const T* a, const T* b, int64_t length) {
    Vector sums = {};
    int64_t at = 0;
    for (; at + kLanes <= length; at += kLanes) sums += load(a + at) * load(b + at);
    float total = sum_of(sums);
    for (; at < length; ++at) total += as_float(a[at]) * as_float(b[at]);
    return total;
}

// One over a norm, given its square; as torch's normalisation, it does not divide by next to nothing.
inline float inverse_norm(float squares) { return 1.0f / std::max(std::sqrt(squares), 1e-12f); }

// Calls `body` with 0, 1, ... below `count`, in so many threads of the pool that torch's own operators run in.
template <typename Body>
void for_each(int64_t count, int64_t threads, const Body& body) {
    if (threads == 1) {  // Not as a clause: regions within a region of one thread would start threads of their own.
        for (int64_t at = 0; at < count; ++at) body(at);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t at = 0; at < count; ++at) body(at);
}

// For each row of a the most similar one of b, the first of equals.
struct Best {
    std::vector<float> similarity;
    std::vector<int64_t> place;

    explicit Best(int64_t rows) : similarity(rows, -INFINITY), place(rows, 0) {}

    void offer(int64_t row, float value, int64_t at) {
        if (value > similarity[row]) {
            similarity[row] = value;
            place[row] = at;
        }
    }

    // For each of `count` places the rows that chose it, of those in `rows`.
    std::vector<std::vector<int64_t>> chosen_by(const std::vector<int64_t>& rows, int64_t count) const {
        std::vector<std::vector<int64_t>> sources(count);
        for (int64_t row : rows) sources[place[row]].push_back(row);
        return sources;
    }
};

// By products of the rows of `a` (rows, depth) and the columns of `b` (depth, columns), which is padded to a multiple of
// kColumns.
Best best_products(const float* a, int64_t rows, const float* b, int64_t columns, int64_t depth, int64_t threads) {
    const int64_t stride = (columns + kColumns - 1) / kColumns * kColumns;
    Best best(rows);
    for_each((rows + kRows - 1) / kRows, threads, [&](int64_t tile) {
        const int64_t row = tile * kRows;
        const float* left[kRows];
        for (int64_t i = 0; i < kRows; ++i) left[i] = a + std::min(row + i, rows - 1) * depth;
        for (int64_t column = 0; column < columns; column += kColumns) {
            Vector products[kRows][kColumns / kLanes] = {};
            for (int64_t k = 0; k < depth; ++k) {
                const float* right = b + k * stride + column;
                for (int64_t j = 0; j < kColumns / kLanes; ++j) {
                    const Vector others = load(right + j * kLanes);
                    for (int64_t i = 0; i < kRows; ++i) products[i][j] += left[i][k] * others;
                }
            }
            const int64_t width = std::min(kColumns, columns - column);
            for (int64_t i = 0; i < kRows && row + i < rows; ++i) {
                float sums[kColumns];
                std::memcpy(sums, products[i], sizeof sums);
                std::fill(sums + width, sums + kColumns, -INFINITY);
                Vector most = load(sums);
                for (int64_t j = kLanes; j < kColumns; j += kLanes) {
                    const Vector others = load(sums + j);
                    most = others > most ? others : most;
                }
                float largest = -INFINITY;
                for (int64_t lane = 0; lane < kLanes; ++lane) largest = most[lane] > largest ? most[lane] : largest;
                if (largest > best.similarity[row + i])
                    best.offer(row + i, largest, column + (std::find(sums, sums + width, largest) - sums));
            }
        }
    });
    return best;
}

// By cosines of rows that are too long to turn about: kTile by kTile products at a time.
template <typename T>
Best best_cosines(const std::vector<const T*>& a, const std::vector<const T*>& b, int64_t depth, int64_t threads) {
    constexpr int64_t kTile = 4;
    const auto inverse_norms = [&](const std::vector<const T*>& rows) {
        std::vector<float> inverse;
        for (const T* row : rows) inverse.push_back(inverse_norm(dot(row, row, depth)));
        return inverse;
    };
    const std::vector<float> of_a = inverse_norms(a), of_b = inverse_norms(b);
    const int64_t rows = a.size(), columns = b.size(), whole = depth / kLanes * kLanes;
    Best best(rows);
    for_each((rows + kTile - 1) / kTile, threads, [&](int64_t tile) {
        const int64_t row = tile * kTile;
        for (int64_t column = 0; column < columns; column += kTile) {
            const T *left[kTile], *right[kTile];
            for (int64_t i = 0; i < kTile; ++i) left[i] = a[std::min(row + i, rows - 1)];
            for (int64_t j = 0; j < kTile; ++j) right[j] = b[std::min(column + j, columns - 1)];
            Vector sums[kTile][kTile] = {};
            for (int64_t k = 0; k < whole; k += kLanes) {
                Vector others[kTile];
                for (int64_t j = 0; j < kTile; ++j) others[j] = load(right[j] + k);
                for (int64_t i = 0; i < kTile; ++i) {
                    const Vector own = load(left[i] + k);
                    for (int64_t j = 0; j < kTile; ++j) sums[i][j] += own * others[j];
                }
            }
            for (int64_t i = 0; i < kTile && row + i < rows; ++i)
                for (int64_t j = 0; j < kTile && column + j < columns; ++j) {
                    const float product = sum_of(sums[i][j]) + dot(left[i] + whole, right[j] + whole, depth - whole);
                    best.offer(row + i, product * of_a[row + i] * of_b[column + j], column + j);
                }
        }
    });
    return best;
}

// Tokens of one image, prefix first, and their sizes; none where all are one.
template <typename T>
struct Image {
    const T* x;
    const float* size;
    int64_t width;

    const T* row(int64_t token) const { return x + token * width; }
    float size_of(int64_t token) const { return size ? size[token] : 1.0f; }

    void copy(int64_t token, T* to) const { std::memcpy(to, row(token), width * sizeof(T)); }

    void add_up(const std::vector<int64_t>& tokens, const std::vector<float>& weights, T* to) const {
        std::vector<float> sums(width, 0.0f);
        for (size_t i = 0; i < tokens.size(); ++i) {
            const T* from = row(tokens[i]);
            for (int64_t c = 0; c < width; ++c) sums[c] += weights[i] * as_float(from[c]);
        }
        for (int64_t c = 0; c < width; ++c) store(sums[c], to[c]);
    }
};

// Keys of one image, (groups, tokens, depth) with these strides.
template <typename T>
struct Keys {
    const T* at;
    int64_t groups, depth, per_group, per_token;

    // Their mean over the groups, divided by its norm, at `to`, `to + step`, ...
    void normalised(int64_t token, float* to, int64_t step) const {
        const T* first = at + token * per_token;
        const float share = 1.0f / static_cast<float>(groups);
        Vector lane_squares = {};
        int64_t d = 0;
        for (; d + kLanes <= depth; d += kLanes) {
            Vector mean = {};
            for (int64_t group = 0; group < groups; ++group) mean += load(first + group * per_group + d);
            mean *= share;
            lane_squares += mean * mean;
            for (int64_t lane = 0; lane < kLanes; ++lane) to[(d + lane) * step] = mean[lane];
        }
        float squares = sum_of(lane_squares);
        for (; d < depth; ++d) {
            float mean = 0.0f;
            for (int64_t group = 0; group < groups; ++group) mean += as_float(first[group * per_group + d]);
            mean *= share;
            squares += mean * mean;
            to[d * step] = mean;
        }
        const float inverse = inverse_norm(squares);
        for (d = 0; d < depth; ++d) to[d * step] *= inverse;
    }
};

template <typename T>
void merge_image(const Keys<T>& keys, int64_t present, const Image<T>& image, int64_t prefix, int64_t removed, T* out,
                 float* out_size, int64_t threads) {
    const int64_t a_offset = prefix % 2;
    const int64_t num_a = (present + 1 - a_offset) / 2, num_b = present - num_a;
    const int64_t stride = (num_b + kColumns - 1) / kColumns * kColumns;
    std::vector<float> a(num_a * keys.depth);
    std::vector<Vector> aligned(keys.depth * stride / kLanes);
    float* const b = reinterpret_cast<float*>(aligned.data());
    for_each(present, threads, [&](int64_t token) {
        if (token % 2 == a_offset)
            keys.normalised(token, a.data() + token / 2 * keys.depth, 1);
        else
            keys.normalised(token, b + token / 2, stride);
    });
    const Best best = best_products(a.data(), num_a, b, num_b, keys.depth, threads);
    std::vector<int64_t> order(num_a);
    std::iota(order.begin(), order.end(), 0);
    const auto more_similar = [&](int64_t one, int64_t other) {
        return best.similarity[one] != best.similarity[other] ? best.similarity[one] > best.similarity[other]
                                                              : one < other;
    };
    if (prefix) {
        std::nth_element(order.begin(), order.begin() + removed, order.end(), more_similar);
        std::sort(order.begin() + removed, order.end());
    } else {
        std::sort(order.begin(), order.end(), more_similar);
    }
    const auto sources = best.chosen_by({order.begin(), order.begin() + removed}, num_b);
    // What stays as it is, in order, then the tokens that others may have gone to.
    std::vector<int64_t> stay;
    for (int64_t token = 0; token < prefix; ++token) stay.push_back(token);
    for (int64_t i = removed; i < num_a; ++i) stay.push_back(prefix + a_offset + 2 * order[i]);
    const int64_t first = stay.size();
    for_each(first + num_b, threads, [&](int64_t at) {
        T* to = out + at * image.width;
        const int64_t token = at < first ? stay[at] : prefix + 1 - a_offset + 2 * (at - first);
        if (at < first || sources[at - first].empty()) {
            image.copy(token, to);
            out_size[at] = image.size_of(token);
            return;
        }
        std::vector<int64_t> tokens = {token};
        for (int64_t source : sources[at - first]) tokens.push_back(prefix + a_offset + 2 * source);
        float total = 0.0f;
        for (int64_t one : tokens) total += image.size_of(one);
        std::vector<float> weights;
        for (int64_t one : tokens) weights.push_back(image.size_of(one) / total);
        image.add_up(tokens, weights, to);
        out_size[at] = total;
    });
}

template <typename T>
void sort_and_merge_image(const float* scores, int64_t present, const Image<T>& image, int64_t prefix,
                          int64_t pruned_to, int64_t merged_to, T* out, float* out_size, int64_t threads) {
    // Not-a-numbers come first, as torch sorts them; compared as they are, they would be in no order.
    std::vector<float> key(scores, scores + present);
    for (float& value : key) value = std::isnan(value) ? INFINITY : value;
    std::vector<int64_t> order(present);
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + pruned_to, order.end(), [&](int64_t one, int64_t other) {
        return key[one] != key[other] ? key[one] > key[other] : one < other;
    });
    std::vector<const T*> kept, merged;
    for (int64_t rank = 0; rank < pruned_to; ++rank)
        (rank < merged_to ? kept : merged).push_back(image.row(prefix + order[rank]));
    std::vector<int64_t> numbers(merged.size());
    std::iota(numbers.begin(), numbers.end(), 0);
    const Best best = best_cosines(merged, kept, image.width, threads);
    const auto sources = best.chosen_by(numbers, merged_to);
    for_each(prefix + merged_to, threads, [&](int64_t at) {
        T* to = out + at * image.width;
        const int64_t rank = at - prefix, token = rank < 0 ? at : prefix + order[rank];
        out_size[at] = image.size_of(token);
        if (rank < 0 || sources[rank].empty()) {
            image.copy(token, to);
            return;
        }
        std::vector<int64_t> tokens = {token};
        for (int64_t i : sources[rank]) {
            tokens.push_back(prefix + order[merged_to + i]);
            out_size[at] += best.similarity[i] * image.size_of(tokens.back());
        }
        image.add_up(tokens, std::vector<float>(tokens.size(), 1.0f / static_cast<float>(tokens.size())), to);
    });
}

// Images side by side where there are enough of them, else the parts of each.
template <typename Body>
void for_each_image(int64_t batch, int64_t threads, const Body& body) {
    const bool has_enough = batch >= threads;
    for_each(batch, has_enough ? threads : 1, [&](int64_t image) { body(image, has_enough ? 1 : threads); });
}

template <typename T>
void merge_matched(const T* metric, int64_t batch, int64_t groups, int64_t present, int64_t depth, int64_t per_image,
                   int64_t per_group, int64_t per_token, const T* x, const float* size, int64_t size_per_image,
                   int64_t prefix, int64_t width, int64_t removed, T* out, float* out_size, int64_t threads) {
    const int64_t tokens = prefix + present, left = tokens - removed;
    for_each_image(batch, threads, [&](int64_t at, int64_t own_threads) {
        const Keys<T> keys{metric + at * per_image, groups, depth, per_group, per_token};
        const Image<T> image{x + at * tokens * width, size ? size + at * size_per_image : nullptr, width};
        merge_image(keys, present, image, prefix, removed, out + at * left * width, out_size + at * left, own_threads);
    });
}

template <typename T>
void sort_and_merge(const float* scores, int64_t batch, int64_t present, const T* x, const float* size,
                    int64_t size_per_image, int64_t prefix, int64_t width, int64_t pruned_to, int64_t merged_to, T* out,
                    float* out_size, int64_t threads) {
    const int64_t tokens = prefix + present, left = prefix + merged_to;
    for_each_image(batch, threads, [&](int64_t at, int64_t own_threads) {
        const Image<T> image{x + at * tokens * width, size ? size + at * size_per_image : nullptr, width};
        sort_and_merge_image(scores + at * present, present, image, prefix, pruned_to, merged_to,
                             out + at * left * width, out_size + at * left, own_threads);
    });
}

// --- operators ------------------------------------------------------------------------------------------------------

void require_done(int32_t error) {
    if (error) throw std::runtime_error("prunefront_native: torch refused what was asked of it (see the lines above)");
}

// A tensor on the CPU, given back when it goes.
class Tensor {
   public:
    explicit Tensor(AtenTensorHandle handle) : handle_(handle) {
        require_done(aoti_torch_get_sizes(handle, &sizes_));
        require_done(aoti_torch_get_strides(handle, &strides_));
        require_done(aoti_torch_get_dtype(handle, &dtype_));
    }
    Tensor(Tensor&& other) noexcept
        : handle_(std::exchange(other.handle_, nullptr)),
          sizes_(other.sizes_),
          strides_(other.strides_),
          dtype_(other.dtype_) {}
    Tensor& operator=(Tensor&&) = delete;
    ~Tensor() {
        if (handle_) aoti_torch_delete_tensor_object(handle_);
    }

    static Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype) {
        std::vector<int64_t> strides(sizes.size(), 1);
        for (size_t dim = sizes.size() - 1; dim > 0; --dim) strides[dim - 1] = strides[dim] * sizes[dim];
        AtenTensorHandle made = nullptr;
        require_done(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype,
                                              aoti_torch_device_type_cpu(), 0, &made));
        return Tensor(made);
    }

    // Itself where the elements of its last `dims` of `all` dimensions lie side by side, else a copy where they do.
    static Tensor with_rows(Tensor own, size_t all, size_t dims) {
        int64_t step = 1;
        bool is_dense = true;
        for (size_t dim = all; dim-- > all - dims; step *= own.size(dim))
            is_dense = is_dense && (own.size(dim) == 1 || own.stride(dim) == step);
        if (is_dense) return own;
        Tensor copy = empty({own.sizes_, own.sizes_ + all}, own.dtype_);
        require_done(aoti_torch_copy_(copy.handle_, own.handle_, 0));
        return copy;
    }

    int64_t size(size_t dim) const { return sizes_[dim]; }
    int64_t stride(size_t dim) const { return strides_[dim]; }
    int32_t dtype() const { return dtype_; }

    template <typename T>
    T* data() const {
        void* data = nullptr;
        require_done(aoti_torch_get_data_ptr(handle_, &data));
        return static_cast<T*>(data);
    }

    StableIValue release() { return reinterpret_cast<StableIValue>(std::exchange(handle_, nullptr)); }

   private:
    AtenTensorHandle handle_;
    int64_t* sizes_ = nullptr;
    int64_t* strides_ = nullptr;
    int32_t dtype_ = 0;
};

Tensor tensor_from(StableIValue value, size_t dims, size_t dense_dims) {
    return Tensor::with_rows(Tensor(reinterpret_cast<AtenTensorHandle>(value)), dims, dense_dims);
}

// Sizes of tokens, (B, N), which all images may share; null where there are none.
class Sizes {
   public:
    explicit Sizes(StableIValue value) {
        if (!value) return;
        auto* const held = reinterpret_cast<StableIValue*>(value);
        given_.emplace(tensor_from(*held, 2, 1));
        delete held;
    }
    const float* data() const { return given_ ? given_->data<float>() : nullptr; }
    int64_t per_image() const { return given_ ? given_->stride(0) : 0; }

   private:
    std::optional<Tensor> given_;
};

int64_t num_threads() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

// Calls `body` with a number of the type of the elements.
template <typename Body>
void for_type_of(const Tensor& x, const Body& body) {
    if (x.dtype() == aoti_torch_dtype_float32())
        body(float{});
    else if (x.dtype() == aoti_torch_dtype_bfloat16())
        body(BFloat16{});
    else
        throw std::runtime_error("prunefront_native: expected tokens in float32 or bfloat16; use torch's operators");
}

// merge_matched(Tensor metric, Tensor x, Tensor? size, int prefix, int removed) -> (Tensor, Tensor)
void merge_matched_operator(StableIValue* stack, uint64_t, uint64_t) {
    const Tensor metric = tensor_from(stack[0], 4, 1), x = tensor_from(stack[1], 3, 3);
    const Sizes size(stack[2]);
    const int64_t prefix = stack[3], removed = stack[4];
    const int64_t batch = x.size(0), left = x.size(1) - removed, width = x.size(2);
    Tensor out = Tensor::empty({batch, left, width}, x.dtype());
    Tensor out_size = Tensor::empty({batch, left}, aoti_torch_dtype_float32());
    for_type_of(x, [&](auto element) {
        using T = decltype(element);
        merge_matched(metric.data<T>(), batch, metric.size(1), metric.size(2), metric.size(3), metric.stride(0),
                      metric.stride(1), metric.stride(2), x.data<T>(), size.data(), size.per_image(), prefix, width,
                      removed, out.data<T>(), out_size.data<float>(), num_threads());
    });
    stack[0] = out.release();
    stack[1] = out_size.release();
}

// sort_and_merge(Tensor scores, Tensor x, Tensor? size, int prefix, int pruned_to, int merged_to) -> (Tensor, Tensor)
void sort_and_merge_operator(StableIValue* stack, uint64_t, uint64_t) {
    const Tensor scores = tensor_from(stack[0], 2, 2), x = tensor_from(stack[1], 3, 3);
    const Sizes size(stack[2]);
    const int64_t prefix = stack[3], pruned_to = stack[4], merged_to = stack[5];
    const int64_t batch = x.size(0), width = x.size(2);
    Tensor out = Tensor::empty({batch, prefix + merged_to, width}, x.dtype());
    Tensor out_size = Tensor::empty({batch, prefix + merged_to}, aoti_torch_dtype_float32());
    for_type_of(x, [&](auto element) {
        using T = decltype(element);
        sort_and_merge(scores.data<float>(), batch, scores.size(1), x.data<T>(), size.data(), size.per_image(), prefix,
                       width, pruned_to, merged_to, out.data<T>(), out_size.data<float>(), num_threads());
    });
    stack[0] = out.release();
    stack[1] = out_size.release();
}

}  // namespace

// Makes torch's operators of these names run here; not 0 if torch refuses. To be called once.
extern "C" int32_t prunefront_register() {
    TorchLibraryHandle library = nullptr;
    if (int32_t error = aoti_torch_library_init_impl("prunefront_native", "CPU", __FILE__, __LINE__, &library)) return error;
    if (int32_t error = aoti_torch_library_impl(library, "merge_matched", merge_matched_operator)) return error;
    return aoti_torch_library_impl(library, "sort_and_merge", sort_and_merge_operator);
}
