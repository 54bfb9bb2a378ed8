"""Mathematics: tensors in, tensors out; imports torch alone."""
