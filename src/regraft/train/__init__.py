"""The one training loop: objectives, data, schedules, teachers, and signals from inside models."""
