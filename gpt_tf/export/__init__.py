"""From a trained GPT to one file for a device: `.tflite` and `.litertlm`."""
