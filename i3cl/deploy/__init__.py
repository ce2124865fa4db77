"""A trained detector outside of training: as an ONNX file that runs without torch, and as a page to try it on.

Importing this imports neither torch nor Ray.
"""

from i3cl.deploy.onnx_predictor import OnnxPredictor

__all__ = ["OnnxPredictor"]
