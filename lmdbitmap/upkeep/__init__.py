"""The examinations behind `check`: whether a store is sound."""
