// An ExecuTorch program, its methods called with inputs that are checked first.

#pragma once

#include <unistd.h>

#include <cstdio>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor_ptr.h>
#include <executorch/extension/tensor/tensor_ptr_maker.h>
#include <executorch/runtime/platform/platform.h>

#include "request.h"

using executorch::aten::Tensor;
using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::extension::TensorPtr;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::MethodMeta;
using executorch::runtime::Tag;

// Defined in the library that attention.py detaches from libtorch; its own registration of them
// does not run.
namespace torch::executor::native {
Tensor& custom_sdpa_out(executorch::runtime::KernelRuntimeContext&, const Tensor& query,
                        const Tensor& key, const Tensor& value, int64_t start,
                        const std::optional<Tensor>& mask, double dropout, bool causal,
                        std::optional<double> scale, Tensor& out);
Tensor& update_cache_out(executorch::runtime::KernelRuntimeContext&, const Tensor& value,
                         Tensor& cache, int64_t start, Tensor& out);
EXECUTORCH_LIBRARY(llama, "custom_sdpa.out", custom_sdpa_out);
EXECUTORCH_LIBRARY(llama, "update_cache.out", update_cache_out);
}  // namespace torch::executor::native

// ExecuTorch logs why it fails, and returns only a number. The first error is the cause.
inline std::string first_error;

inline std::string said() {
  return first_error.empty() ? "" : " ExecuTorch says: " + first_error;
}

inline void keep_error(et_timestamp_t, et_pal_log_level_t level, const char*, const char*, size_t,
                       const char* message, size_t length) {
  if (first_error.empty() && (level == kError || level == kFatal)) {
    first_error.assign(message, length);
    for (char& c : first_error) {
      if (c == '\n') c = ' ';
    }
  }
}

[[noreturn]] inline void abort_with_reason() {
  std::fprintf(stderr, "ExecuTorch gave up.%s\n", said().c_str());
  _exit(kAbort);
}

inline void listen() {
  using executorch::runtime::PalImpl;
  executorch::runtime::register_pal(PalImpl::create(nullptr, abort_with_reason, nullptr, nullptr,
                                                    keep_error, nullptr, nullptr, __FILE__));
}

inline std::string named(Error error) {
  std::string name = executorch::runtime::to_string(error);
  return name.substr(name.find("::") + 2);  // without the "Error::" before it
}

// A tensor of our own.
struct Output {
  ScalarType dtype;
  Shape shape;
  std::vector<uint8_t> bytes;
};

class Program {
 public:
  Program(const std::string& path, const std::vector<std::string>& data)
      : module_(path, data, Module::LoadMode::Mmap) {
    const auto consistent = executorch::runtime::Program::Verification::InternalConsistency;
    const Error error = module_.load(consistent);
    if (error != Error::Ok) {
      throw Failure{kLoad, "cannot load " + path + ": " + named(error) + "." + said()};
    }
  }

  std::vector<Output> call(const std::string& method, const std::vector<TensorPtr>& inputs) {
    first_error.clear();
    const MethodMeta meta = load(method);
    check(method, meta, inputs);
    // Outputs that the program has no memory for; a kernel may write some bytes past the end.
    std::vector<std::vector<uint8_t>> memory(meta.num_outputs());
    for (size_t i = 0; i < memory.size(); ++i) {
      const auto info = meta.output_tensor_meta(i);
      if (!info.ok() || info->is_memory_planned()) continue;
      memory[i].resize(info->nbytes() + kAlignment);
      const Shape shape(info->sizes().begin(), info->sizes().end());
      accept(method, module_.set_output(method, from_blob(memory[i].data(), shape,
                                                          info->scalar_type()), i));
    }
    const auto returned =
        module_.execute(method, std::vector<EValue>(inputs.begin(), inputs.end()));
    accept(method, returned.error());
    std::vector<Output> outputs;
    for (const EValue& value : *returned) outputs.push_back(copy(method, value));
    return outputs;
  }

 private:
  MethodMeta load(const std::string& method) {
    const auto methods = module_.method_names();
    if (methods.ok() && methods->count(method) == 0) {
      std::string known;
      for (const auto& name : std::set<std::string>(methods->begin(), methods->end())) {
        known += (known.empty() ? "" : ", ") + name;
      }
      throw Failure{kCall, "there is no method '" + method + "'; the program has " + known + "."};
    }
    const auto meta = module_.method_meta(method);
    const Error error = meta.ok() ? module_.load_method(method) : meta.error();
    if (error != Error::Ok) {
      throw Failure{kLoad, "cannot load the method " + method + ": " + named(error) + "." + said()};
    }
    return *meta;
  }

  // ExecuTorch's own refusal of an input says neither which it is nor what the method takes.
  static void check(const std::string& method, const MethodMeta& meta,
                    const std::vector<TensorPtr>& inputs) {
    if (meta.num_inputs() != inputs.size()) {
      throw Failure{kCall, method + " takes " + std::to_string(meta.num_inputs()) +
                               " inputs, not " + std::to_string(inputs.size()) + "."};
    }
    for (size_t i = 0; i < inputs.size(); ++i) {
      const std::string what = "input " + std::to_string(i) + " of " + method;
      const auto info = meta.input_tensor_meta(i);
      if (!info.ok()) throw Failure{kCall, what + " is not a tensor in the program."};
      const auto bounds = info->sizes();
      const auto sizes = inputs[i]->sizes();
      bool fits = inputs[i]->scalar_type() == info->scalar_type() && sizes.size() == bounds.size();
      for (size_t d = 0; fits && d < sizes.size(); ++d) fits = sizes[d] <= bounds[d];
      if (!fits) {
        throw Failure{kCall, what + " is " + dtype_name(inputs[i]->scalar_type()) + " " +
                                 shape_name(sizes) + "; it must be " +
                                 dtype_name(info->scalar_type()) + " and at most " +
                                 shape_name(bounds) + "."};
      }
    }
  }

  static void accept(const std::string& method, Error error) {
    if (error == Error::Ok) return;
    throw Failure{kCall, "a call of " + method + " fails: " + named(error) + "." + said()};
  }

  static Output copy(const std::string& method, const EValue& value) {
    const auto single = [](ScalarType dtype, auto number) {
      const auto* first = reinterpret_cast<const uint8_t*>(&number);
      return Output{dtype, {}, std::vector<uint8_t>(first, first + sizeof number)};
    };
    if (value.isInt()) return single(ScalarType::Long, value.toInt());
    if (value.isDouble()) return single(ScalarType::Double, value.toDouble());
    if (value.isBool()) return single(ScalarType::Bool, value.toBool());
    if (!value.isTensor()) throw Failure{kCall, "an output of " + method + " is not a tensor."};
    const Tensor tensor = value.toTensor();
    const auto order = tensor.dim_order();
    for (size_t d = 0; d < order.size(); ++d) {
      if (order[d] != d) throw Failure{kCall, "an output of " + method + " is not contiguous."};
    }
    Output output{tensor.scalar_type(), Shape(tensor.sizes().begin(), tensor.sizes().end()), {}};
    // It may become an input, and a kernel may read some bytes past its end.
    output.bytes.reserve(tensor.nbytes() + kAlignment);
    const auto* first = static_cast<const uint8_t*>(tensor.const_data_ptr());
    output.bytes.assign(first, first + tensor.nbytes());
    return output;
  }

  Module module_;
};
