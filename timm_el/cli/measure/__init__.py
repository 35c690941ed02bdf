"""What `python -m timm_el bench` measures: training, inference, layers, and the engines of others."""
