// One AdamW update of a flat partition in host memory, in one pass over it: unscaling and clipping of the gradient,
// moments, master weights, and the weights the GPU fetches. DeepSpeed's CPU Adam makes a pass for each of these.
//
// Sixteen-bit master weights and moments are rounded stochastically: rounding to nearest would lose every update
// below half a unit in the last place, and a second moment with beta2 = 0.999 could never shrink.

#include <torch/extension.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <stdexcept>

namespace {

struct bf16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

inline void to_nearest(float x, float* out) { *out = x; }
inline void to_nearest(float x, bf16* out) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    out->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// `noise` is uniform on [0, 65536).
inline void stochastically(float x, uint32_t, float* out) { *out = x; }
inline void stochastically(float x, uint32_t noise, bf16* out) {
    out->bits = static_cast<uint16_t>((std::bit_cast<uint32_t>(x) + noise) >> 16);
}

// A hash with low bias; constants found by the hash prospector (github.com/skeeto/hash-prospector).
inline uint32_t hashed(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

struct Scalars {
    float gradient_scale, lr, beta1, beta2, rest1, rest2, eps, weight_decay, bias1, bias2;
    uint32_t seed;
};

template <typename Weight, typename Master, typename Moment>
void update(Weight* __restrict weights,
            Master* __restrict master,  // nullptr: the weights are their own master
            const Weight* __restrict gradients,
            Moment* __restrict exp_avg,
            Moment* __restrict exp_avg_sq,
            int64_t count,
            const Scalars s,
            int threads) {
    constexpr int64_t chunk = 1 << 15;
// Dynamic: threads that launch GPU kernels take cores away from some chunks.
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t start = 0; start < count; start += chunk) {
        const int64_t end = std::min(start + chunk, count);
#pragma omp simd
        for (int64_t i = start; i < end; ++i) {
            const float gradient = widen(gradients[i]) * s.gradient_scale;
            const float m = s.beta1 * widen(exp_avg[i]) + s.rest1 * gradient;
            const float v = s.beta2 * widen(exp_avg_sq[i]) + s.rest2 * gradient * gradient;
            float w = std::is_same_v<Weight, Master> ? widen(weights[i]) : widen(master[i]);
            w -= s.lr * s.weight_decay * w;
            w -= s.lr / s.bias1 * m / (std::sqrt(v / s.bias2) + s.eps);
            const uint32_t noise = hashed(static_cast<uint32_t>(i) + s.seed);
            stochastically(m, noise & 0xffffu, &exp_avg[i]);
            stochastically(v, noise >> 16, &exp_avg_sq[i]);
            if constexpr (std::is_same_v<Weight, Master>) {
                stochastically(w, hashed(noise) & 0xffffu, &weights[i]);
            } else {
                master[i] = w;
                to_nearest(w, &weights[i]);
            }
        }
    }
}

template <typename T>
T* data(const torch::Tensor& tensor) {
    return static_cast<T*>(tensor.data_ptr());
}

void check(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

// All tensors are contiguous, on the CPU and of one size. `master` may be the weights themselves.
void adam_update(const torch::Tensor& weights,
                 const torch::Tensor& master,
                 const torch::Tensor& gradients,
                 const torch::Tensor& exp_avg,
                 const torch::Tensor& exp_avg_sq,
                 int64_t step,
                 double gradient_scale,
                 double lr,
                 double beta1,
                 double beta2,
                 double eps,
                 double weight_decay,
                 int64_t seed,
                 int64_t threads) {
    for (const auto& tensor : {weights, master, gradients, exp_avg, exp_avg_sq}) {
        check(tensor.device().is_cpu() && tensor.is_contiguous(), "tensors must be contiguous and on the CPU");
        check(tensor.numel() == weights.numel(), "tensors must have the same number of elements");
    }
    check(gradients.scalar_type() == weights.scalar_type(), "gradients must have the weights' dtype");
    check(exp_avg.scalar_type() == exp_avg_sq.scalar_type(), "both moments must have the same dtype");
    const Scalars s{static_cast<float>(gradient_scale),
                    static_cast<float>(lr),
                    static_cast<float>(beta1),
                    static_cast<float>(beta2),
                    static_cast<float>(1.0 - beta1),  // of the exact beta: the difference of floats is far off
                    static_cast<float>(1.0 - beta2),
                    static_cast<float>(eps),
                    static_cast<float>(weight_decay),
                    static_cast<float>(1.0 - std::pow(beta1, step)),
                    static_cast<float>(1.0 - std::pow(beta2, step)),
                    hashed(static_cast<uint32_t>(seed))};
    const auto run = [&]<typename Weight, typename Master, typename Moment>() {
        update<Weight, Master, Moment>(data<Weight>(weights),
                                       std::is_same_v<Weight, Master> ? nullptr : data<Master>(master),
                                       data<Weight>(gradients),
                                       data<Moment>(exp_avg),
                                       data<Moment>(exp_avg_sq),
                                       weights.numel(),
                                       s,
                                       static_cast<int>(threads));
    };
    const auto weight_type = weights.scalar_type(), moment_type = exp_avg.scalar_type();
    const bool own_master = master.data_ptr() == weights.data_ptr();
    if (own_master && weight_type == torch::kBFloat16 && moment_type == torch::kBFloat16) {
        run.template operator()<bf16, bf16, bf16>();
    } else if (own_master && weight_type == torch::kFloat && moment_type == torch::kFloat) {
        run.template operator()<float, float, float>();
    } else if (master.scalar_type() == torch::kFloat && weight_type == torch::kBFloat16 &&
               moment_type == torch::kFloat) {
        run.template operator()<bf16, float, float>();
    } else {
        throw std::invalid_argument("no update for this combination of dtypes");
    }
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.def("adam_update", &adam_update, pybind11::call_guard<pybind11::gil_scoped_release>());
}
