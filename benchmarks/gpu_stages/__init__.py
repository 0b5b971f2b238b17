"""The stages of on_a_gpu.py, one file each: run(scene) measures, and returns what JSON can hold."""
