"""The model as pure functions of `params`. No files, text, meshes, logging, sampling or devices."""
