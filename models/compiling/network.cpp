// A compiled network as a class of TorchScript, since torch gives up the interpreter's lock while it runs a method of
// one. Its own Python class for compiled networks keeps the lock: other threads would wait for each step.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/custom_class.h>

namespace {

using Weights = c10::Dict<std::string, at::Tensor>;

struct Network : torch::CustomClassHolder {
  Network(const std::string& path, bool one_thread, int64_t num_threads, int64_t device_index)
      : package_(path, "model", one_thread, num_threads, static_cast<c10::DeviceIndex>(device_index)) {}

  std::vector<std::string> weight_names() {
    return package_.get_constant_fqns();
  }

  // Not copied: what changes in these tensors changes the network.
  void use_weights(const Weights& weights) {
    std::unordered_map<std::string, at::Tensor> by_name;
    for (const auto& entry : weights) {
      by_name.emplace(entry.key(), entry.value());
    }
    package_.load_constants(by_name, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
  }

  std::vector<at::Tensor> run(std::vector<at::Tensor> inputs) {
    return package_.boxed_run(std::move(inputs));
  }

 private:
  torch::inductor::AOTIModelPackageLoader package_;
};

using Self = c10::intrusive_ptr<Network>;

}  // namespace

TORCH_LIBRARY(fewstep, library) {
  library.class_<Network>("Network")
      .def(torch::init<std::string, bool, int64_t, int64_t>())
      .def("weight_names", [](const Self& self) { return self->weight_names(); })
      .def("use_weights", [](const Self& self, const Weights& weights) { self->use_weights(weights); })
      .def("run", [](const Self& self, std::vector<at::Tensor> inputs) { return self->run(std::move(inputs)); });
}
