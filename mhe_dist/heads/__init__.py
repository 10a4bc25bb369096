"""The classifiers over all classes, behind one contract."""
