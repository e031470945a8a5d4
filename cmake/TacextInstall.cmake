# What find_package(tacext) finds: tacext::core, its headers, and nothing of torch.
include(CMakePackageConfigHelpers)

install(TARGETS tacext_core_library EXPORT tacextTargets LIBRARY DESTINATION lib)
install(DIRECTORY "${PROJECT_SOURCE_DIR}/cpp/core/include/tacext" DESTINATION include)
install(EXPORT tacextTargets NAMESPACE tacext:: DESTINATION lib/cmake/tacext)
configure_package_config_file("${CMAKE_CURRENT_LIST_DIR}/tacextConfig.cmake.in"
  "${PROJECT_BINARY_DIR}/tacextConfig.cmake" INSTALL_DESTINATION lib/cmake/tacext)
write_basic_package_version_file("${PROJECT_BINARY_DIR}/tacextConfigVersion.cmake"
  COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/tacextConfig.cmake" "${PROJECT_BINARY_DIR}/tacextConfigVersion.cmake"
  DESTINATION lib/cmake/tacext)
