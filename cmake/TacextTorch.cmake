# tacext::torch: headers and libraries of the torch wheel of the running Python.
#
# find_package(Torch) is avoided: with a CUDA build of torch it stops on a machine without a CUDA
# toolkit, and where there is one it forces its own architectures on every kernel.
if(NOT TACEXT_TORCH_DIR)
  # In pip's isolated build the interpreter sees the build requirements alone; platlib is still the
  # folder of the environment that is installed into, and may hold the torch to build against.
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
      "import importlib.util as u, os, sysconfig; s = u.find_spec('torch'); print(os.path.dirname(s.origin) if s else os.path.join(sysconfig.get_path('platlib'), 'torch'), end='')"
    OUTPUT_VARIABLE TACEXT_TORCH_DIR COMMAND_ERROR_IS_FATAL ANY)
endif()
if(NOT EXISTS "${TACEXT_TORCH_DIR}/include/torch/headeronly/version.h")
  message(FATAL_ERROR "torch 2.11 or newer not found for ${Python_EXECUTABLE} "
    "(looked in '${TACEXT_TORCH_DIR}'): install it there, or set TACEXT_TORCH_DIR")
endif()
file(STRINGS "${TACEXT_TORCH_DIR}/version.py" _torch_version_line REGEX "^__version__ *=")
string(REGEX MATCH "[0-9]+\\.[0-9]+[^'\"]*" TACEXT_TORCH_VERSION "${_torch_version_line}")

add_library(tacext_torch INTERFACE)
add_library(tacext::torch ALIAS tacext_torch)
target_include_directories(tacext_torch SYSTEM INTERFACE "${TACEXT_TORCH_DIR}/include")
foreach(_library IN ITEMS torch torch_cpu c10)
  if(NOT EXISTS "${TACEXT_TORCH_DIR}/lib/lib${_library}.so")
    message(FATAL_ERROR "torch: no lib${_library}.so in ${TACEXT_TORCH_DIR}/lib")
  endif()
  target_link_libraries(tacext_torch INTERFACE "${TACEXT_TORCH_DIR}/lib/lib${_library}.so")
endforeach()
message(STATUS "torch ${TACEXT_TORCH_VERSION} in ${TACEXT_TORCH_DIR}")
