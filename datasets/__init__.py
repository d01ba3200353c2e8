"""Slides to bags: the patch store, labels and splits, bags, augmentation."""
