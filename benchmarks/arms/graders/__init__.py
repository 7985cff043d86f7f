"""Graders of the arms, as files for `grade.graders`. They are programs, so the correct behavior is known exactly."""
