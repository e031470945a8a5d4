// Runs a model with ONNX Runtime and guards it:
//
//   guard_onnx MODEL GUARD INPUTS
//
// MODEL is an .onnx file with one input of float32 [N, ...] and the outputs "latent" [N, D] and
// "logits" [N, C], as torch.onnx.export(guard.model, ...) makes it. INPUTS holds rows of raw
// float32 as the model takes them. Prints a line for every input: the predicted class, score,
// p-value, and FLAGGED. All inputs are one batch here; a server would pass what it has.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "tacext/guard.h"

namespace {

std::vector<float> read_floats(const char* path) {
  std::ifstream file(path, std::ios::binary);
  file.exceptions(std::ios::badbit);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  if (bytes.size() % sizeof(float) != 0) throw std::runtime_error("INPUTS ends within a number");
  std::vector<float> values(bytes.size() / sizeof(float));
  std::copy_n(bytes.begin(), bytes.size(), reinterpret_cast<char*>(values.data()));
  return values;
}

// Width of the rows of an output [rows, width], or -1.
std::int64_t width_of(const Ort::Value& value, std::int64_t rows) {
  const auto info = value.GetTensorTypeAndShapeInfo();
  const std::vector<std::int64_t> shape = info.GetShape();
  const bool fits = info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  return fits && shape.size() == 2 && shape[0] == rows ? shape[1] : -1;
}

int guard_inputs(const char* model, const tacext::GuardTable& table, std::vector<float> inputs) {
  Ort::Env environment(ORT_LOGGING_LEVEL_WARNING, "guard_onnx");
  Ort::Session session(environment, model, Ort::SessionOptions{});
  std::vector<std::int64_t> shape =
      session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
  // Numbers in one input; 0 where the model leaves open what shape it takes.
  const auto size = static_cast<std::int64_t>(inputs.size());
  std::int64_t each = shape.empty() ? 0 : 1;
  for (std::size_t i = 1; i < shape.size(); ++i)
    each = shape[i] > 0 && shape[i] <= size && each <= size ? each * shape[i] : 0;
  if (each <= 0 || size == 0 || size % each != 0) {
    std::fprintf(stderr, "error: INPUTS does not hold inputs of the model's shape\n");
    return 2;
  }
  const std::int64_t count = shape[0] = size / each;

  Ort::AllocatorWithDefaultOptions allocator;
  const auto input_name = session.GetInputNameAllocated(0, allocator);
  const char* const names_in[] = {input_name.get()};
  const char* const names_out[] = {"latent", "logits"};
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const Ort::Value input = Ort::Value::CreateTensor<float>(memory, inputs.data(), inputs.size(),
                                                           shape.data(), shape.size());
  const std::vector<Ort::Value> outputs =
      session.Run(Ort::RunOptions{}, names_in, &input, 1, names_out, 2);
  if (width_of(outputs[0], count) != table.latents ||
      width_of(outputs[1], count) != table.classes) {
    std::fprintf(stderr, "error: the guard is one of another model\n");
    return 2;
  }

  const float* logits = outputs[1].GetTensorData<float>();
  const auto rows = static_cast<std::size_t>(count);
  std::vector<float> score(rows), p_value(rows);
  const std::unique_ptr<bool[]> flagged(new bool[rows]);
  tacext::guard_score<float>(
      table, {outputs[0].GetTensorData<float>(), table.latents, logits, table.classes, count},
      {score.data(), p_value.data(), flagged.get()}, tacext::serial_for);
  for (std::size_t i = 0; i < rows; ++i) {
    const float* row = logits + static_cast<std::int64_t>(i) * table.classes;
    std::printf("%lld %.9g %.9g%s\n",
                static_cast<long long>(std::max_element(row, row + table.classes) - row), score[i],
                p_value[i], flagged[i] ? " FLAGGED" : "");
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: guard_onnx MODEL GUARD INPUTS\n");
    return 4;
  }
  std::string error;
  const std::unique_ptr<tacext::GuardFile> guard = tacext::GuardFile::read(argv[2], &error);
  if (!guard) {
    std::fprintf(stderr, "error: %s\n", error.c_str());
    return 2;
  }
  try {
    return guard_inputs(argv[1], guard->table(), read_floats(argv[3]));
  } catch (const std::exception& failure) {
    std::fprintf(stderr, "error: %s\n", failure.what());
    return 2;
  }
}
