// Loads a model with LibTorch and guards it:
//
//   guard_model MODEL GUARD INPUTS
//
// MODEL is a TorchScript file that returns (output, latents, logits), as
// torch.jit.trace(guard.model, ..) makes it; INPUTS holds a tensor that torch.jit saved as the
// attribute "inputs" of a module. Prints a line for every input: the predicted class, score,
// p-value, and FLAGGED.
#include <torch/script.h>

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "tacext/guard.h"

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: guard_model MODEL GUARD INPUTS\n");
    return 4;
  }
  std::string error;
  const std::unique_ptr<tacext::GuardFile> guard = tacext::GuardFile::read(argv[2], &error);
  if (!guard) {
    std::fprintf(stderr, "error: %s\n", error.c_str());
    return 2;
  }
  try {
    const torch::InferenceMode inference;
    torch::jit::Module model = torch::jit::load(argv[1]);
    const at::Tensor inputs = torch::jit::load(argv[3]).attr("inputs").toTensor();
    const auto found = model.forward({inputs}).toTuple();
    const at::Tensor latent = found->elements()[1].toTensor().contiguous().to(at::kFloat);
    const at::Tensor logits = found->elements()[2].toTensor().contiguous().to(at::kFloat);
    const tacext::GuardTable& table = guard->table();
    if (latent.size(1) != table.latents || logits.size(1) != table.classes) {
      std::fprintf(stderr, "error: the guard is one of another model\n");
      return 2;
    }
    const std::int64_t count = latent.size(0);
    const auto rows = static_cast<std::size_t>(count);
    std::vector<float> score(rows), p_value(rows);
    const std::unique_ptr<bool[]> flagged(new bool[rows]);
    tacext::guard_score<float>(table,
                               {latent.const_data_ptr<float>(), table.latents,
                                logits.const_data_ptr<float>(), table.classes, count},
                               {score.data(), p_value.data(), flagged.get()}, tacext::serial_for);
    const at::Tensor predicted = logits.argmax(1);
    for (std::size_t i = 0; i < rows; ++i)
      std::printf("%lld %.9g %.9g%s\n",
                  static_cast<long long>(predicted[static_cast<std::int64_t>(i)].item<int64_t>()),
                  score[i], p_value[i], flagged[i] ? " FLAGGED" : "");
  } catch (const c10::Error& failure) {
    std::fprintf(stderr, "error: %s\n", failure.what_without_backtrace());
    return 2;
  }
  return 0;
}
