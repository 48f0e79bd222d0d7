"""Pretrained models of sgacodec, one .safetensors file each."""
