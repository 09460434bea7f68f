// Merging tokens on a CPU, one image after the other: what torch needs a dozen small operators for, each of which costs
// more than the arithmetic of a whole merge at batch 1. `prunefront/ops/merge.py` says what is computed, and why.
//
// Plain C functions: built by whatever compiler is there in two seconds, without torch's headers. Row-major, float32 or
// bfloat16 tokens, float32 sizes; sums are in float32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

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
using Vector = float __attribute__((vector_size(kLanes * sizeof(float))));

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

struct Best {
    std::vector<float> similarity;
    std::vector<int64_t> place;
};

// For each of the rows of `a` (rows, depth) the largest product with a column of `b` (depth, columns), the first of
// equals. `b` is padded to a multiple of kColumns.
void best_products(const float* a, int64_t rows, const float* b, int64_t columns, int64_t depth, Best& best) {
    const int64_t stride = (columns + kColumns - 1) / kColumns * kColumns;
    best.similarity.assign(rows, -INFINITY);
    best.place.assign(rows, 0);
    for (int64_t row = 0; row < rows; row += kRows) {
        const float* left[kRows];
        for (int64_t i = 0; i < kRows; ++i) left[i] = a + std::min(row + i, rows - 1) * depth;
        for (int64_t column = 0; column < columns; column += kColumns) {
            float sums[kRows][kColumns] = {};
            for (int64_t k = 0; k < depth; ++k) {
                const float* right = b + k * stride + column;
                for (int64_t i = 0; i < kRows; ++i) {
                    const float factor = left[i][k];
                    for (int64_t j = 0; j < kColumns; ++j) sums[i][j] += factor * right[j];
                }
            }
            const int64_t width = std::min(kColumns, columns - column);
            for (int64_t i = 0; i < kRows && row + i < rows; ++i) {
                float largest = -INFINITY;
                for (int64_t j = 0; j < width; ++j) largest = std::max(largest, sums[i][j]);
                if (largest > best.similarity[row + i]) {
                    int64_t j = 0;
                    while (sums[i][j] != largest) ++j;
                    best.similarity[row + i] = largest;
                    best.place[row + i] = column + j;
                }
            }
        }
    }
}

// The same for rows that are too long to turn about: products of rows with rows, kTile by kTile at a time. Both are given
// as pointers; products are divided by the norms.
template <typename T>
void best_cosines(const std::vector<const T*>& a, const std::vector<const T*>& b, int64_t depth, Best& best) {
    constexpr int64_t kTile = 4;
    const auto inverse_norms = [&](const std::vector<const T*>& rows) {
        std::vector<float> inverse;
        for (const T* row : rows) inverse.push_back(1.0f / std::max(std::sqrt(dot(row, row, depth)), 1e-12f));
        return inverse;
    };
    const std::vector<float> of_a = inverse_norms(a), of_b = inverse_norms(b);
    const int64_t rows = a.size(), columns = b.size(), whole = depth / kLanes * kLanes;
    best.similarity.assign(rows, -INFINITY);
    best.place.assign(rows, 0);
    for (int64_t row = 0; row < rows; row += kTile) {
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
            for (int64_t i = 0; i < kTile && row + i < rows; ++i) {
                for (int64_t j = 0; j < kTile && column + j < columns; ++j) {
                    const float product = sum_of(sums[i][j]) + dot(left[i] + whole, right[j] + whole, depth - whole);
                    const float cosine = product * of_a[row + i] * of_b[column + j];
                    if (cosine > best.similarity[row + i]) {
                        best.similarity[row + i] = cosine;
                        best.place[row + i] = column + j;
                    }
                }
            }
        }
    }
}

// Row `to` of width `width` = the weighted sum of some rows of `x`.
template <typename T>
void weighted_row(const T* x, int64_t width, const std::vector<int64_t>& rows, const std::vector<float>& weights, T* to,
                  std::vector<float>& sums) {
    sums.assign(width, 0.0f);
    for (size_t i = 0; i < rows.size(); ++i) {
        const T* row = x + rows[i] * width;
        const float weight = weights[i];
        for (int64_t c = 0; c < width; ++c) sums[c] += weight * as_float(row[c]);
    }
    for (int64_t c = 0; c < width; ++c) store(sums[c], to[c]);
}

template <typename T>
void merge_matched(const T* metric, int64_t batch, int64_t groups, int64_t present, int64_t depth, int64_t per_image,
                   int64_t per_group, int64_t per_token, const T* x, const float* size, int64_t size_per_image,
                   int64_t prefix, int64_t width, int64_t removed, T* out, float* out_size) {
    const int64_t a_offset = prefix % 2;
    const int64_t num_a = (present + 1 - a_offset) / 2, num_b = present - num_a;
    const int64_t stride = (num_b + kColumns - 1) / kColumns * kColumns;
    const int64_t tokens = prefix + present, left = tokens - removed;
    std::vector<float> a(num_a * depth), b(depth * stride), mean(depth), sums;
    std::vector<std::vector<int64_t>> sources(num_b);
    std::vector<int64_t> order(num_a), rows;
    std::vector<float> weights;
    Best best;
    for (int64_t image = 0; image < batch; ++image) {
        for (int64_t token = 0; token < present; ++token) {
            std::fill(mean.begin(), mean.end(), 0.0f);
            for (int64_t group = 0; group < groups; ++group) {
                const T* row = metric + image * per_image + group * per_group + token * per_token;
                for (int64_t d = 0; d < depth; ++d) mean[d] += as_float(row[d]);
            }
            // The groups' number cancels, but for where the norm is so small that it is not divided by.
            const float scale = 1.0f / static_cast<float>(groups);
            for (float& value : mean) value *= scale;
            const float inverse = 1.0f / std::max(std::sqrt(dot(mean.data(), mean.data(), depth)), 1e-12f);
            if (token % 2 == a_offset) {
                float* row = a.data() + token / 2 * depth;
                for (int64_t d = 0; d < depth; ++d) row[d] = mean[d] * inverse;
            } else {
                for (int64_t d = 0; d < depth; ++d) b[d * stride + token / 2] = mean[d] * inverse;
            }
        }
        best_products(a.data(), num_a, b.data(), num_b, depth, best);
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
        for (auto& of : sources) of.clear();
        for (int64_t i = 0; i < removed; ++i) sources[best.place[order[i]]].push_back(order[i]);

        const T* from = x + image * tokens * width;
        const float* from_size = size ? size + image * size_per_image : nullptr;
        T* to = out + image * left * width;
        float* to_size = out_size + image * left;
        const auto size_of = [&](int64_t token) { return from_size ? from_size[token] : 1.0f; };
        const auto copy = [&](int64_t token) {
            std::memcpy(to, from + token * width, width * sizeof(T));
            to += width;
            *to_size++ = size_of(token);
        };
        for (int64_t token = 0; token < prefix; ++token) copy(token);
        for (int64_t i = removed; i < num_a; ++i) copy(prefix + a_offset + 2 * order[i]);
        for (int64_t j = 0; j < num_b; ++j) {
            const int64_t own = prefix + 1 - a_offset + 2 * j;
            if (sources[j].empty()) {
                copy(own);
                continue;
            }
            rows.assign(1, own);
            for (int64_t source : sources[j]) rows.push_back(prefix + a_offset + 2 * source);
            float total = 0.0f;
            for (int64_t row : rows) total += size_of(row);
            weights.clear();
            for (int64_t row : rows) weights.push_back(size_of(row) / total);
            weighted_row(from, width, rows, weights, to, sums);
            to += width;
            *to_size++ = total;
        }
    }
}

template <typename T>
void sort_and_merge(const float* scores, int64_t batch, int64_t present, const T* x, const float* size,
                    int64_t size_per_image, int64_t prefix, int64_t width, int64_t pruned_to, int64_t merged_to, T* out,
                    float* out_size) {
    const int64_t tokens = prefix + present, left = prefix + merged_to, tail = pruned_to - merged_to;
    std::vector<int64_t> order(present), rows;
    std::vector<float> key(present), weights, sums;
    std::vector<std::vector<int64_t>> sources(merged_to);
    Best best;
    for (int64_t image = 0; image < batch; ++image) {
        // Not-a-numbers come first, as torch sorts them; compared as they are, they would be in no order.
        for (int64_t i = 0; i < present; ++i) {
            const float score = scores[image * present + i];
            key[i] = std::isnan(score) ? INFINITY : score;
        }
        const T* from = x + image * tokens * width;
        const float* from_size = size ? size + image * size_per_image : nullptr;
        std::iota(order.begin(), order.end(), 0);
        std::partial_sort(order.begin(), order.begin() + pruned_to, order.end(), [&](int64_t one, int64_t other) {
            return key[one] != key[other] ? key[one] > key[other] : one < other;
        });
        const auto row_of = [&](int64_t rank) { return from + (prefix + order[rank]) * width; };
        std::vector<const T*> kept, merged;
        for (int64_t rank = 0; rank < pruned_to; ++rank) (rank < merged_to ? kept : merged).push_back(row_of(rank));
        best_cosines(merged, kept, width, best);
        for (auto& of : sources) of.clear();
        for (int64_t i = 0; i < tail; ++i) sources[best.place[i]].push_back(i);

        T* to = out + image * left * width;
        float* to_size = out_size + image * left;
        const auto size_of = [&](int64_t token) { return from_size ? from_size[token] : 1.0f; };
        std::memcpy(to, from, prefix * width * sizeof(T));
        for (int64_t token = 0; token < prefix; ++token) to_size[token] = size_of(token);
        for (int64_t rank = 0; rank < merged_to; ++rank) {
            T* row = to + (prefix + rank) * width;
            float own = size_of(prefix + order[rank]);
            if (sources[rank].empty()) {
                std::memcpy(row, row_of(rank), width * sizeof(T));
            } else {
                rows.assign(1, prefix + order[rank]);
                for (int64_t i : sources[rank]) {
                    rows.push_back(prefix + order[merged_to + i]);
                    own += best.similarity[i] * size_of(rows.back());
                }
                weights.assign(rows.size(), 1.0f / static_cast<float>(rows.size()));
                weighted_row(from, width, rows, weights, row, sums);
            }
            to_size[prefix + rank] = own;
        }
    }
}

}  // namespace

#define PRUNEFRONT_FOR(NAME, TYPE)                                                                                     \
    extern "C" void prunefront_merge_matched_##NAME(                                                                   \
        const void* metric, int64_t batch, int64_t groups, int64_t present, int64_t depth, int64_t per_image,          \
        int64_t per_group, int64_t per_token, const void* x, const float* size, int64_t size_per_image, int64_t prefix, \
        int64_t width, int64_t removed, void* out, float* out_size) {                                                  \
        merge_matched(static_cast<const TYPE*>(metric), batch, groups, present, depth, per_image, per_group, per_token, \
                      static_cast<const TYPE*>(x), size, size_per_image, prefix, width, removed,                       \
                      static_cast<TYPE*>(out), out_size);                                                              \
    }                                                                                                                  \
    extern "C" void prunefront_sort_and_merge_##NAME(                                                                  \
        const float* scores, int64_t batch, int64_t present, const void* x, const float* size, int64_t size_per_image, \
        int64_t prefix, int64_t width, int64_t pruned_to, int64_t merged_to, void* out, float* out_size) {             \
        sort_and_merge(scores, batch, present, static_cast<const TYPE*>(x), size, size_per_image, prefix, width,       \
                       pruned_to, merged_to, static_cast<TYPE*>(out), out_size);                                       \
    }

PRUNEFRONT_FOR(float32, float)
PRUNEFRONT_FOR(bfloat16, BFloat16)
