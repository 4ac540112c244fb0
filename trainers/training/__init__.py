"""What `fit` trains, and what the trainings share."""
