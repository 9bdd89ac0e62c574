"""Learning-rate schedules under the names that configuration files have for them."""
