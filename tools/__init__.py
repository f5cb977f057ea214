"""What is run by hand: ``python -m tools.gpu`` on a machine with a GPU, ``python -m tools.cuda_report`` anywhere."""
