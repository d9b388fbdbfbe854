# The customer's side of AWS PrivateLink. Written by demarc mesh privatelink: change its arguments, not this file.
terraform {
  required_version = ">= 1.6"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 5.60"
    }
  }
}

resource "aws_security_group" "demarc" {
  name        = "demarc-privatelink"
  description = "demarc: who may use the endpoint of the vendor's control plane"
  vpc_id      = "vpc-0123456789abcdef0"
}

resource "aws_vpc_security_group_ingress_rule" "appliance_10_2e1_2e2_2e0_2f24" {
  security_group_id = aws_security_group.demarc.id
  cidr_ipv4         = "10.1.2.0/24"
  ip_protocol       = "tcp"
  from_port         = 7443
  to_port           = 7443
}

resource "aws_vpc_security_group_ingress_rule" "appliance_10_2e1_2e3_2e0_2f24" {
  security_group_id = aws_security_group.demarc.id
  cidr_ipv4         = "10.1.3.0/24"
  ip_protocol       = "tcp"
  from_port         = 7443
  to_port           = 7443
}

resource "aws_vpc_endpoint" "demarc" {
  vpc_id              = "vpc-0123456789abcdef0"
  service_name        = "com.amazonaws.vpce.eu-central-1.vpce-svc-0123456789abcdef0"
  vpc_endpoint_type   = "Interface"
  subnet_ids          = ["subnet-0123456789abcdef0"]
  security_group_ids  = [aws_security_group.demarc.id]
  private_dns_enabled = false
  tags = {
    Name = "demarc"
  }
}

output "address" {
  description = "Write this into transports[].addresses of the appliance's file, kind privatelink; the vendor accepts the connection first"
  value       = join(":", [aws_vpc_endpoint.demarc.dns_entry[0].dns_name, "7443"])
}

output "endpoint" {
  description = "The vendor accepts this connection"
  value       = aws_vpc_endpoint.demarc.id
}

output "state" {
  description = "pendingAcceptance until the vendor has accepted"
  value       = aws_vpc_endpoint.demarc.state
}
