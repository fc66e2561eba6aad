//! Webhooks in the shape of well-known senders: their paths are made up, their header fields and the
//! outline of their bodies are not.

use std::time::SystemTime;

use serde_json::Value;

use crate::request::{self, Headers, Invalid, Request};

/// One to be sent.
pub(super) struct Webhook {
    /// The sender's own, by which it is told apart at both ends.
    pub(super) id: String,
    pub(super) request: Request,
}

struct Kind {
    target: &'static str,
    user_agent: &'static str,
    /// `ID` in here and in the body stands for the webhook's.
    fields: &'static [(&'static str, &'static str)],
    body: &'static str,
}

const KINDS: [Kind; 4] = [
    Kind {
        target: "/webhooks/github",
        user_agent: "GitHub-Hookshot/044aadd",
        fields: &[
            ("X-GitHub-Event", "push"),
            ("X-GitHub-Delivery", "ID"),
            ("X-GitHub-Hook-ID", "292430182"),
            (
                "X-Hub-Signature-256",
                "sha256=d57c68ca6f92289e6987922ff26938930f6e66a2d161ef06abdf1859230aa23c",
            ),
        ],
        body: r#"{"ref":"refs/heads/main","before":"6113728f27ae82c7b1a177c8d03f9e96e0adf246","after":"0d1a26e67d8f5eaf1f6ba5c57fc3c7d91ac0fd1c","repository":{"id":186853002,"name":"shop","full_name":"example/shop","private":true},"pusher":{"name":"octocat","email":"octocat@example.com"},"commits":[{"id":"0d1a26e67d8f5eaf1f6ba5c57fc3c7d91ac0fd1c","message":"Round totals once","added":[],"removed":[],"modified":["src/total.rs"]}]}"#,
    },
    Kind {
        target: "/webhooks/shopify?shop=example",
        user_agent: "Shopify-Captain-Hook",
        fields: &[
            ("X-Shopify-Topic", "orders/create"),
            ("X-Shopify-Shop-Domain", "example.myshopify.com"),
            ("X-Shopify-API-Version", "2025-01"),
            ("X-Shopify-Webhook-Id", "ID"),
            (
                "X-Shopify-Hmac-Sha256",
                "XWmrwMey6OsLMeiZKwP4FppHH3cmAiiJJAweH5Jo4bM=",
            ),
        ],
        body: r##"{"id":820982911946154508,"admin_graphql_api_id":"gid://shopify/Order/820982911946154508","name":"#9999","currency":"EUR","financial_status":"paid","total_price":"398.00","email":"jon@example.com","line_items":[{"id":866550311766439020,"title":"IPod Nano - 8GB","quantity":1,"price":"199.00","sku":"IPOD2008PINK"},{"id":141249953214522974,"title":"IPod Nano - 8GB","quantity":1,"price":"199.00","sku":"IPOD2008PINK"}]}"##,
    },
    Kind {
        target: "/webhooks/stripe",
        user_agent: "Stripe/1.0 (+https://stripe.com/docs/webhooks)",
        fields: &[(
            "Stripe-Signature",
            "t=1700000000,v1=5257a869e7ecebeda32affa62cdca3fa51cad7e77a0e56ff536d0ce8e108d8bd",
        )],
        body: r#"{"id":"ID","object":"event","api_version":"2024-06-20","created":1700000000,"type":"payment_intent.succeeded","livemode":false,"pending_webhooks":1,"data":{"object":{"id":"pi_3MtwBwLkdIwHu7ix28a3tqPa","object":"payment_intent","amount":39800,"currency":"eur","status":"succeeded"}}}"#,
    },
    Kind {
        target: "/webhooks/ebay",
        user_agent: "eBayNotification/1.0",
        fields: &[(
            "X-EBAY-SIGNATURE",
            "eyJhbGciOiJlY2RzYSIsImtpZCI6Ijk5MzYyNjFhLTdkN2ItNDYyMS1hMGYxLTk2Y2NiNDI4YWY0OCJ9",
        )],
        body: r#"{"metadata":{"topic":"MARKETPLACE_ACCOUNT_DELETION","schemaVersion":"1.0","deprecated":false},"notification":{"notificationId":"ID","eventDate":"2025-09-19T20:43:59.462Z","publishDate":"2025-09-19T20:43:59.679Z","publishAttemptCount":1,"data":{"username":"test_user","userId":"ma8vp1jySJC","eiasToken":"nY+sHZ2PrBmdj6wVnY+sEZ2PrA2dj6wJnY+gAZGEpwmdj6x9nY+seQ=="}}}"#,
    },
];

/// The next of each kind in turn.
pub(super) fn make(number: usize) -> Result<Webhook, Invalid> {
    let kind = &KINDS[number % KINDS.len()];
    let received_at = SystemTime::now();
    let id = request::new_id(received_at).to_string();
    let mut headers = Headers::default();
    headers.push("User-Agent", kind.user_agent.as_bytes())?;
    headers.push("Content-Type", b"application/json")?;
    for (name, value) in kind.fields {
        headers.push(name, value.replace("ID", &id).as_bytes())?;
    }
    let request = Request {
        id: request::new_id(received_at),
        received_at,
        method: "POST".to_owned(),
        target: kind.target.to_owned(),
        headers,
        body: kind
            .body
            .replace("\"ID\"", &format!("\"{id}\""))
            .into_bytes(),
    };
    Ok(Webhook { id, request })
}

/// Finds the id of one that arrived, where its sender puts it.
pub(super) fn id<'a>(field: impl Fn(&str) -> Option<&'a str>, body: &[u8]) -> Option<String> {
    let in_field = ["X-GitHub-Delivery", "X-Shopify-Webhook-Id"]
        .into_iter()
        .find_map(field);
    if let Some(id) = in_field {
        return Some(id.to_owned());
    }
    let body: Value = serde_json::from_slice(body).ok()?;
    ["/notification/notificationId", "/id"]
        .into_iter()
        .find_map(|place| body.pointer(place)?.as_str().map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_an_id_that_is_found_again() {
        for number in 0..KINDS.len() {
            let Webhook {
                id: expected,
                request,
            } = make(number).unwrap();
            request.check().unwrap();
            assert!(serde_json::from_slice::<Value>(&request.body).is_ok());
            let fields: Vec<_> = request.headers.iter().collect();
            let field = |name: &str| {
                let found = fields.iter().find(|(found, _)| *found == name);
                found.map(|(_, value)| std::str::from_utf8(value).unwrap())
            };
            assert_eq!(id(field, &request.body), Some(expected));
        }
        assert_eq!(id(|_| None, b"no JSON"), None);
        assert_eq!(id(|_| None, b"{}"), None);
    }
}
