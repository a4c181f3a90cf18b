"""Secure aggregation: many silos' vectors are seen only as their sum."""
