"""Learning from the unlabelled images of the training subjects, beside the labelled ones."""
