# Eigen 3.4 or newer: the system's, one named by Eigen3_DIR or CMAKE_PREFIX_PATH, or the PyPI
# package cmeel-eigen, whose prefix lies beside the Python packages (also in pip's isolated build).
find_package(Eigen3 3.4 CONFIG QUIET)
if(NOT Eigen3_FOUND AND TACEXT_PYTHON)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
      "import os, sys; print(';'.join(p for p in (os.path.join(q, 'cmeel.prefix') for q in sys.path) if os.path.isdir(p)), end='')"
    OUTPUT_VARIABLE _cmeel_prefixes COMMAND_ERROR_IS_FATAL ANY)
  find_package(Eigen3 3.4 CONFIG QUIET PATHS ${_cmeel_prefixes} NO_DEFAULT_PATH)
endif()
if(NOT Eigen3_FOUND)
  message(FATAL_ERROR "Eigen 3.4 or newer not found: pip install cmeel-eigen, or set Eigen3_DIR")
endif()
message(STATUS "Eigen ${Eigen3_VERSION} in ${Eigen3_DIR}")
